"""What a back end corrects leaves the system corrected, in a replay and on the live graph."""

import json

import numpy as np
import pytest
import yaml
from node_harness import CAMERA_FRAME, NodeUnderTest, matrix
from recordings import MESSAGES, recorded
from safetensors.numpy import load_file
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from stream3r_core.config import CoreConfig, from_dict
from stream3r_core.evaluation.trajectory import ate
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_core.slam import make_reconstructor
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk
from stream3r_core.synthetic.scripted import SIZE_HW, ScriptedNetwork, scripted_image
from stream3r_ros.bag import BagWriter
from stream3r_ros.cli import main
from stream3r_ros.conversions import depth_from_message, stamp_ns
from stream3r_ros.messages import rclpy_class
from stream3r_ros.outputs import TOPICS
from stream3r_ros.parameters import nest
from stream3r_ros.qos import SENSOR_DATA

START_NS, STEP_NS, FRAMES = 10**18, 10**8, 16
BACKEND = {
    'backend.kind': 'submaps',
    'backend.submaps.max_frames': FRAMES,
    'mapping.voxel_size': 0.5,
    'mapping.edge_ratio': 0.0,
}
GRID = {
    'outputs.occupancy_grid.enabled': True,
    'outputs.occupancy_grid.camera_height': 2.0,
    'outputs.occupancy_grid.resolution': 0.5,
}
# The shipped node, but for the network: that of a simulated front end along a walk.
SCRIPTED_NODE = f"""
import sys
import stream3r_ros.managed_node as node
from stream3r_ros.cli import main
from stream3r_core.synthetic.front_end import Disturbance, SimulatedFrontEnd, make_walk
from stream3r_core.synthetic.scripted import SIZE_HW, ScriptedNetwork
walk = make_walk('laps', 0, size_m=0.4)
drift = Disturbance(scale=0.06, rotation_deg=2.0, translation=0.04, depth_noise=0.003, outliers=0)
front_end = SimulatedFrontEnd(walk, 0, drift, session_frames={FRAMES}, size_hw=SIZE_HW)
node.load_configured_model = lambda options: ScriptedNetwork(front_end)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope='module')
def walk():
    return make_walk('laps', 0, size_m=0.4)


def image(frame):
    return MESSAGES.rgb_image(scripted_image(frame), START_NS + frame * STEP_NS, CAMERA_FRAME)


def replay(output, *arguments):
    assert main(['replay', *map(str, arguments), '--output', str(output)]) == 0
    return json.loads((output / 'summary.json').read_text())


def distance_to(points, others):
    return np.array([np.linalg.norm(others - point, axis=1).min() for point in points])


def points_of(message):
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(-1, message.point_step)
    return rows[:, :12].copy().view(np.float32)


def matrix_of_pose(pose):
    q, p = pose.orientation, pose.position
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix()
    T[:3, 3] = p.x, p.y, p.z
    return T


def shows_walls_of(grid, points_xyz):
    """Whether cells are occupied where the map of the end has points in the band of heights."""
    corner = grid.info.origin.position
    heights = (points_xyz[:, 2] - corner.z) / 2.0
    band = points_xyz[(heights > 0.15) & (heights < 1.1), :2]
    cells = np.floor((band - [corner.x, corner.y]) / 0.5).astype(int)
    size = np.array([grid.info.width, grid.info.height])
    columns, rows = cells[((cells >= 0) & (cells < size)).all(1)].T
    counts = np.zeros((grid.info.height, grid.info.width), int)
    np.add.at(counts, (rows, columns), 1)
    occupied = np.reshape(grid.data, counts.shape) == 100
    is_whole = len(rows) == len(cells)
    return is_whole and occupied.sum() > 20 and ((counts >= 2) == occupied).mean() > 0.995


def test_a_replay_writes_where_all_frames_lie_at_the_end(walk, tmp_path, monkeypatch):
    count = len(walk.stamps_ns)
    with BagWriter(tmp_path / 'bag') as bag:
        for frame in range(count):
            bag.write('/image', image(frame), START_NS + frame * STEP_NS, SENSOR_DATA)
    front_end = SimulatedFrontEnd(walk, 0, session_frames=FRAMES, size_hw=SIZE_HW)
    monkeypatch.setattr(
        'stream3r_ros.replay.load_configured_model', lambda options: ScriptedNetwork(front_end)
    )
    asked = BACKEND | GRID
    options = [word for name, value in asked.items() for word in ('--set', f'{name}={value}')]
    out = tmp_path / 'out'
    summary = replay(out, tmp_path / 'bag', *options)
    assert summary['images_out'] == count and summary['backend']['loops_verified'] > 3
    final, online = (read_trajectory(out / f'trajectory{n}.tum') for n in ('', '_online'))
    stamps = (START_NS + np.arange(count) * STEP_NS).tolist()
    assert final.stamps_ns.tolist() == online.stamps_ns.tolist() == stamps
    truth = type(final)(final.stamps_ns, walk.T_world_camera, 'truth')
    assert ate(truth, final, 'sim3').rmse < 0.8 * ate(truth, online, 'sim3').rmse
    messages = recorded(out)
    path = messages['/stream3r/path'][-1]
    assert [stamp_ns(pose) for pose in path.poses] == stamps
    poses = np.array([matrix_of_pose(pose.pose) for pose in path.poses])
    np.testing.assert_allclose(poses, final.T_world_camera, atol=1e-6)
    seen = [stamp_ns(m.transforms[0]) for m in messages['/tf']]
    assert seen == stamps  # each once: what was said of the past is not said otherwise
    cloud = load_ply(out / 'map.ply')
    assert len(cloud) == summary['map_points'] == messages['/stream3r/map'][-1].width
    (grid,) = messages['/stream3r/occupancy_grid']
    assert shows_walls_of(grid, cloud.points_xyz)
    again = replay(tmp_path / 'more', tmp_path / 'bag', *options,
                   '--set', f'backend.load={out}/map.safetensors')  # fmt: skip
    assert again['backend']['submaps'] > summary['backend']['submaps']
    assert again['backend']['loops_verified'] > 3
    assert yaml.safe_load((out / 'config.yaml').read_text())
    assert json.loads((out / 'summary.json').read_text())['backend'] == summary['backend']


@pytest.mark.ros
def test_after_a_closed_loop_transform_path_and_map_agree(walk, spawn, node, spin_until, tmp_path):
    observer, node = node, NodeUnderTest(spawn, node, spin_until, tmp_path / 'node.log')
    parameters = {
        **BACKEND, **GRID, 'outputs.occupancy_grid.period_s': 0.1, 'mapping.voxel_size': 0.2,
        'status.period_s': 0.1,
        'save_map.directory': tmp_path / 'saved', 'outputs.path.max_rate_hz': 0.0,
        'outputs.map.period_s': 0.1, 'outputs.map_changes.period_s': 0.1,
    }  # fmt: skip
    start(spawn, node, parameters)
    count = 80  # the second round begins at 45
    for frame in range(count):
        node.finish(_live_image(node, frame))
    node.wait_until(lambda: node.figure('backend_pending') == 0)
    assert node.figure('corrections') > 0 and node.figure('loops_verified') > 3

    transforms = [message.transforms[0] for message in node.received['/tf']]
    stamps = [stamp_ns(t) for t in transforms]
    assert stamps == [START_NS + i * STEP_NS for i in range(count)]  # each once
    saved = node.call('save_map')
    assert saved.success and 'map.safetensors' in saved.message
    final = read_trajectory(tmp_path / 'saved' / 'trajectory.tum')
    cloud = load_ply(tmp_path / 'saved' / 'map.ply')

    late = []  # a subscriber that comes now gets all there is, whatever a slow machine has lost
    changes = TOPICS['~/map_changes']
    observer.create_subscription(
        rclpy_class(changes.type), '/stream3r/map_changes', late.append, changes.qos.for_rclpy()
    )

    def is_settled():
        path, last = node.received['~/path'][-1], node.received['~/map'][-1]
        poses = np.array([matrix_of_pose(pose.pose) for pose in path.poses])
        if len(poses) != count or not np.allclose(poses, final.T_world_camera, atol=1e-6):
            return False
        if last.width != len(cloud) or not np.allclose(
            points_of(last), cloud.points_xyz, atol=1e-4
        ):
            return False
        return len(_followed(late)) == len(cloud)

    node.wait_until(is_settled)
    node.wait_until(
        lambda: shows_walls_of(node.received['~/occupancy_grid'][-1], cloud.points_xyz)
    )
    assert not shows_walls_of(node.received['~/occupancy_grid'][0], cloud.points_xyz)
    path, last = node.received['~/path'][-1], node.received['~/map'][-1]
    np.testing.assert_allclose(points_of(last), cloud.points_xyz, atol=1e-4)
    assert [stamp_ns(pose) for pose in path.poses] == stamps
    newest = matrix(transforms[-1].transform)
    np.testing.assert_allclose(newest, matrix_of_pose(path.poses[-1].pose), atol=2e-2)
    followed = _followed(late)
    assert np.quantile(distance_to(followed[::50], cloud.points_xyz), 0.99) < 0.05
    # what the first and the second round saw of the same walls: two layers before, one after
    before, after = layers(tmp_path / 'saved' / 'map.safetensors', points_of(last), second=45)
    assert before > 0.2 and after < 0.1, (before, after)
    # the path at first, as it was said then, is another one: it has moved
    first = {stamp_ns(p): matrix_of_pose(p.pose) for p in node.received['~/path'][-1].poses}
    said = {stamp_ns(t): matrix(t.transform) for t in transforms}
    moved = [np.linalg.norm(first[s][:3, 3] - said[s][:3, 3]) for s in stamps]
    assert max(moved) > 0.01
    # a new session begins a new map, which whoever follows the changes gets in its place
    assert node.call('reset').success
    for frame in range(count, count + 3):
        node.finish(_live_image(node, frame))
    node.wait_until(lambda: 0 < node.figure('map_points') == len(_followed(late)) < len(cloud))


@pytest.mark.ros
def test_a_map_without_metres_is_scaled_for_those_who_localise_in_it(
    walk, spawn, node, spin_until, tmp_path
):
    settings = {**BACKEND, 'backend.submaps.max_frames': FRAMES}
    front_end = SimulatedFrontEnd(walk, 0, session_frames=FRAMES, size_hw=SIZE_HW)
    mapper = make_reconstructor(ScriptedNetwork(front_end), from_dict(CoreConfig, nest(settings)))
    for frame in range(50):
        mapper.feed(scripted_image(frame), START_NS + frame * STEP_NS)
    (tmp_path / 'map.safetensors').write_bytes(mapper.pack())
    depth = node.create_publisher(rclpy_class('sensor_msgs/msg/Image'), '/depth', 10)
    node = NodeUnderTest(spawn, node, spin_until, tmp_path / 'node.log')
    start(spawn, node, {
        **settings, 'backend.load': tmp_path / 'map.safetensors', 'backend.localize_only': True,
        'scale.source': 'depth', 'scale.min_ratios': 3, 'status.period_s': 0.1,
    })  # fmt: skip
    node.wait_until(depth.get_subscription_count)

    def done():
        return node.figure('images_processed') + node.figure('images_dropped')

    wall_m = np.full(SIZE_HW, 7.0, np.float32)
    for frame in range(20, 44):
        stamp = START_NS + (100 + frame) * STEP_NS
        depth.publish(node.messages.float_image(wall_m, stamp, CAMERA_FRAME))
        picture = node.messages.rgb_image(scripted_image(frame), stamp, CAMERA_FRAME)
        node.send(picture, done)  # refused until the place is found
    node.wait_until(lambda: node.figure('scale') == 'metric')
    said = depth_from_message(node.received['~/depth/image'][-1])
    assert np.nanmedian(7.0 / said) == pytest.approx(1, rel=0.2)


def start(spawn, node, parameters):
    """Start the scripted node."""
    words = [word for name, value in parameters.items() for word in ('-p', f'{name}:={value}')]
    with node.log_file.open('w') as log:
        node.process = spawn('-c', SCRIPTED_NODE, 'node', '--ros-args', *words,
                             stdout=log, stderr=log)  # fmt: skip
    node.wait_until(lambda: node.figure('state') == 'active')
    node.connect_camera()


def layers(map_file, published, second):
    """Median distance [m] from walls of the second round to those of the first.

    Without loops, from the saved map, and in the published map, whose rows are those of the
    submaps in their order. Walls are what lies at the height of the camera.
    """
    submaps = load_file(map_file)
    keys = sorted({int(name.split('.')[1]) for name in submaps if name.startswith('submap.')})
    without, start = {1: [], 2: []}, 0
    with_loops = {1: [], 2: []}
    for key in keys:
        frames, points = (submaps[f'submap.{key}.{n}'] for n in ('frame_ids', 'points_xyz'))
        S = submaps[f'submap.{key}.S_odom_submap']
        chain = points @ S[:3, :3].T + S[:3, 3]
        now = published[start : start + len(points)]
        start += len(points)
        round_of = 1 if frames[-1] < second else 2 if frames[0] >= second else 0
        if round_of:
            without[round_of].append(chain[np.abs(chain[:, 1]) < 0.6][:, [0, 2]])  # optical axes
            with_loops[round_of].append(now[np.abs(now[:, 2]) < 0.6][:, :2])  # map, z up
    assert start == len(published)
    return [
        np.median(cKDTree(np.concatenate(w[1])).query(np.concatenate(w[2]))[0])
        for w in (without, with_loops)
    ]


def _live_image(node, frame):
    stamp = START_NS + frame * STEP_NS
    return node.messages.rgb_image(scripted_image(frame), stamp, CAMERA_FRAME)


def _followed(messages):
    """The points [N, 3] that a subscriber of ``~/map_changes`` holds."""
    begins = max((i for i, message in enumerate(messages) if not message.width), default=None)
    if begins is None:
        return np.zeros((0, 3))
    rows = np.concatenate(
        [
            np.frombuffer(bytes(message.data), np.uint8).reshape(-1, message.point_step)
            for message in messages[begins:]
        ]
    )[::-1]
    numbers = rows[:, -8:].copy().view(np.uint64)[:, 0]
    newest = rows[np.unique(numbers, return_index=True)[1]]
    there = newest[:, -12:-8].copy().view(np.float32)[:, 0] > 0
    return newest[there][:, :12].copy().view(np.float32)
