"""The grid for navigation: as nav_msgs, for late listeners, the same from node and replay."""

from dataclasses import replace

import numpy as np
import pytest
from node_harness import CAMERA_FRAME, SMALL, picture, stamp
from recordings import MESSAGES, recorded
from rosbags.typesys import Stores, get_typestore
from test_outputs import ROOM_M, VOXEL_M, true_predictions

from stream3r_core.checkpoints import load_model
from stream3r_core.config import MappingConfig, OccupancyConfig, from_dict
from stream3r_core.errors import DataError
from stream3r_core.mapping import VoxelMap
from stream3r_core.pipeline import Reconstructor
from stream3r_ros.bag import BagWriter
from stream3r_ros.cli import main
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rclpy_class, rclpy_messages, rosbags_messages
from stream3r_ros.occupancy import map_grid, tan_half_width
from stream3r_ros.outputs import TOPICS, Outputs
from stream3r_ros.parameters import nest
from stream3r_ros.qos import SENSOR_DATA
from stream3r_ros.results import RunBag

pytestmark = pytest.mark.usefixtures('one_thread')
NUM_IMAGES = 4
GRID = {
    'outputs.occupancy_grid.enabled': True,
    'outputs.occupancy_grid.camera_height': 1.0,  # nothing is level to an untrained network
}


@pytest.fixture(params=['rosbags', pytest.param('rclpy', marks=pytest.mark.ros)])
def messages(request):
    return {'rosbags': rosbags_messages, 'rclpy': rclpy_messages}[request.param]()


def true_room(messages):
    """Outputs, map and poses of a camera that looks around in the exact room."""
    outputs = Outputs(messages, 'world_of_the_robot')
    config = MappingConfig(voxel_size=VOXEL_M, min_confidence=1.0, confidence_quantile=0.0)
    voxel_map, predictions = VoxelMap(config), list(true_predictions())
    for prediction in predictions:
        voxel_map.integrate(prediction)
    poses = np.stack([prediction.T_world_camera.numpy() for prediction in predictions])
    return outputs, voxel_map, poses, tan_half_width(predictions[0])


def cell_of(message, x, y):
    """Value of the cell at a place of the map, as a planner finds it."""
    info = message.info
    column = int(np.floor((x - info.origin.position.x) / info.resolution))
    row = int(np.floor((y - info.origin.position.y) / info.resolution))
    assert 0 <= column < info.width and 0 <= row < info.height
    return message.data[row * info.width + column]


@pytest.mark.parametrize('scale', [1.0, 2.5])
def test_a_planner_finds_the_walls_of_the_true_room(messages, scale):
    outputs, *seen = true_room(messages)
    outputs.set_scale(scale)
    options = OccupancyConfig(resolution=0.17 * scale)  # no wall stands between two cells
    message = outputs.occupancy_grid(map_grid(outputs.world, *seen, options), stamp(3))
    assert stamp_ns(message) == stamp(3) and message.header.frame_id == 'world_of_the_robot'
    assert message.info.resolution == pytest.approx(0.17 * scale)
    by_voxels = map_grid(outputs.world, *seen, OccupancyConfig())
    assert by_voxels.resolution == pytest.approx(3 * VOXEL_M * scale)
    assert message.info.origin.orientation.w == 1 and len(message.data) == (
        message.info.width * message.info.height
    )
    assert message.info.origin.position.z == pytest.approx(scale * ROOM_M[0, 2], abs=0.02)
    assert set(np.unique(message.data)) <= {-1, 0, 100}
    (x0, y0, _), (x1, y1, _) = ROOM_M
    for x in np.arange(x0 + 0.3, x1 - 0.3, 0.15):
        for y in np.arange(y0 + 0.3, y1 - 0.3, 0.15):
            assert cell_of(message, scale * x, scale * y) == 0
    for y in np.arange(y0 + 0.2, y1 - 0.2, 0.1):
        assert cell_of(message, scale * (x1 + 0.001), scale * y) == 100
    data = np.array(message.data).reshape(message.info.height, message.info.width)
    border = data[1:-1, [0, -1]], data[[0, -1], 1:-1].T  # but for the corners
    assert all((side != 0).all() for side in border)
    content = messages.serialize(message)
    again = get_typestore(Stores.ROS2_JAZZY).deserialize_cdr(content, 'nav_msgs/msg/OccupancyGrid')
    assert np.array_equal(again.data, message.data) and again.info.width == message.info.width


def test_without_a_map_there_is_no_grid():
    outputs = Outputs(rosbags_messages())
    with pytest.raises(DataError, match='empty'):
        map_grid(outputs.world, VoxelMap(), np.eye(4)[None], 1.0, OccupancyConfig())


def offline_grid(messages, num_images):
    """The message that images give without any ROS graph or bag between."""
    config = from_dict(NodeConfig, nest({**SMALL, **GRID}))
    model = load_model(config.model.preset, weights=config.model.weights)
    reconstructor, outputs = Reconstructor(model, config), Outputs(messages, config.map_frame)
    seen = [reconstructor.process(picture(i), stamp(i)) for i in range(num_images)]
    poses = np.stack([prediction.T_world_camera.numpy() for prediction in seen])
    options = config.outputs.occupancy_grid
    grid = map_grid(outputs.world, reconstructor.map, poses, tan_half_width(seen[-1]), options)
    return outputs.occupancy_grid(grid, stamp(num_images - 1))


def test_a_replay_writes_the_grid_of_the_end_if_asked_to(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        for index in range(NUM_IMAGES):
            image = MESSAGES.rgb_image(picture(index), stamp(index), CAMERA_FRAME)
            bag.write('/image', image, stamp(index), SENSOR_DATA)
    for name, asked in (('with', GRID), ('without', {})):
        options = [
            word
            for pair in {**SMALL, **asked}.items()
            for word in ('--set', '{}={}'.format(*pair))
        ]
        assert (
            main(['replay', str(tmp_path / 'bag'), '--output', str(tmp_path / name), *options])
            == 0
        )
    (message,) = recorded(tmp_path / 'with')['/stream3r/occupancy_grid']
    expected = offline_grid(rosbags_messages(), NUM_IMAGES)
    assert MESSAGES.serialize(message) == MESSAGES.serialize(expected)
    assert '/stream3r/occupancy_grid' not in recorded(tmp_path / 'without')


def test_a_replay_holds_few_poses_for_its_grid_and_these_from_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.setattr('stream3r_ros.results.MAX_GRID_POSES', 4)
    config = from_dict(NodeConfig, nest({**SMALL, **GRID}))
    reconstructor = Reconstructor(load_model(config.model.preset, 'random'), config)
    bag, prediction = RunBag(tmp_path, config, reconstructor.map), None
    with bag:
        for index in range(9):
            prediction = prediction or reconstructor.process(picture(index), stamp(index))
            pose = prediction.T_world_camera.clone()
            pose[0, 3] = index
            bag.add(replace(prediction, stamp_ns=stamp(index), T_world_camera=pose), 'camera')
            assert len(bag._poses) <= 4
        kept = [int(pose[0, 3]) for pose in bag._poses]
        assert kept == [0, 4, 8]


@pytest.mark.ros
def test_a_grid_is_made_for_listeners_only_and_late_ones_get_the_last(live, node):
    (ours,) = (s for s in node.subscriptions if s.topic_name == '/stream3r/occupancy_grid')
    node.destroy_subscription(ours)
    live.start(**GRID, **{'outputs.occupancy_grid.period_s': 0.1, 'outputs.map.period_s': 0.1})
    live.connect_camera()
    live.feed(*range(NUM_IMAGES))
    last = stamp(NUM_IMAGES - 1)
    live.wait_until(
        lambda: live.received['~/map'] and stamp_ns(live.received['~/map'][-1]) == last
    )
    warning = 'takes the first image for level'  # which making a grid entails
    assert warning not in live.log
    expected = offline_grid(rclpy_messages(), NUM_IMAGES)
    assert 100 in expected.data
    kind, qos = TOPICS['~/occupancy_grid']
    for _ in range(2):  # the first has it made, the second gets what was made before it came
        late = []
        node.create_subscription(
            rclpy_class(kind), '/stream3r/occupancy_grid', late.append, qos.for_rclpy()
        )
        live.wait_until(lambda late=late: late)
        assert late == [expected]
    assert live.log.count(warning) == 1
