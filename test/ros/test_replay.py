"""Replay: no image lost, always the same result, held to the core and to the truth."""

import cv2
import numpy as np
import pytest
import yaml
from recordings import (
    CAMERA_FRAME,
    MESSAGES,
    picture,
    recorded,
    replay,
    rgb,
    stamp,
    true_pose,
    true_tf,
    write_images,
    write_photos,
    write_ros1,
)

from stream3r_core.config import from_dict
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import read_trajectory, write_tum
from stream3r_core.mapping import load_ply
from stream3r_core.pipeline import Reconstructor, load_configured_model, reconstruct_photos
from stream3r_ros.bag import BagWriter
from stream3r_ros.calibration import Calibrator
from stream3r_ros.cli import main
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import Lens, stamp_ns
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.outputs import Outputs
from stream3r_ros.results import RECORDED

SETTINGS = {'model': {'weights': 'random'}, 'image': {'long_side': 56}}
NUM = 6
STAMPS = [stamp(index) for index in range(NUM)]


def reconstruct(indices=range(NUM), settings=SETTINGS):
    """The same images through the core, and the messages of the results."""
    config = from_dict(NodeConfig, settings)
    reconstructor = Reconstructor(load_configured_model(config.model), config)
    outputs = Outputs(rosbags_messages(), mapping=config.mapping)
    frames = [
        outputs.add(reconstructor.process(picture(index), stamp(index)), CAMERA_FRAME)
        for index in indices
    ]
    return frames, outputs, reconstructor.map.points()


def test_every_image_comes_out_once_with_its_stamp(tmp_path):
    summary = replay(tmp_path / 'out', write_images(tmp_path / 'bag'))
    assert (summary['images_in'], summary['images_out'], summary['refused']) == (NUM, NUM, [])
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == STAMPS
    messages = recorded(tmp_path / 'out')
    assert [stamp_ns(m.transforms[0]) for m in messages.pop('/tf')] == STAMPS
    per_frame = {topic.replace('~', '/stream3r') for topic in RECORDED} - {'/tf'}
    for topic in per_frame:
        assert [stamp_ns(m) for m in messages.pop(topic)] == STAMPS, topic
    (path,), (cloud,) = messages.pop('/stream3r/path'), messages.pop('/stream3r/map')
    assert not messages
    assert [stamp_ns(pose) for pose in path.poses] == STAMPS
    assert len(load_ply(tmp_path / 'out' / 'map.ply')) == cloud.width == summary['map_points'] > 0


def test_replay_gives_what_the_core_gives_message_by_message(tmp_path):
    replay(tmp_path / 'out', write_images(tmp_path / 'bag'))
    messages = recorded(tmp_path / 'out')
    frames, outputs, cloud = reconstruct()
    for topic in RECORDED:
        for said, frame in zip(messages[topic.replace('~', '/stream3r')], frames, strict=True):
            assert MESSAGES.serialize(said) == MESSAGES.serialize(frame.message(topic)), topic
    expected_map = outputs.map(cloud, STAMPS[-1])
    assert MESSAGES.serialize(messages['/stream3r/map'][0]) == MESSAGES.serialize(expected_map)
    saved = load_ply(tmp_path / 'out' / 'map.ply')
    np.testing.assert_array_equal(saved.points_xyz, outputs.world.cloud(cloud).points_xyz)
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    poses = [frame.T_map_camera for frame in frames]
    np.testing.assert_allclose(trajectory.T_world_camera, poses, atol=1e-6)


def test_two_replays_are_equal_to_the_byte(tmp_path):
    bag = write_images(tmp_path / 'bag')
    for name in ('a', 'b'):
        replay(tmp_path / name, bag)
    for file in ('trajectory.tum', 'map.ply', 'bag/bag.mcap', 'config.yaml'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes(), file


def test_the_truth_in_a_bag_is_judged_by_and_never_used(tmp_path):
    plain = write_images(tmp_path / 'plain')
    with_truth = write_images(tmp_path / 'with_truth', extra={'/tf': true_tf})
    assert replay(tmp_path / 'a', plain)['ate'] == ''
    ate = replay(tmp_path / 'b', with_truth)['ate']
    assert ate['truth'] == f'/tf map -> {CAMERA_FRAME}' and ate['poses'] == NUM
    for file in ('trajectory.tum', 'map.ply', 'bag/bag.mcap'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes(), file


def test_the_ate_of_a_moved_and_scaled_copy_is_zero(tmp_path, capsys):
    frames, *_ = reconstruct()
    T_other_map, scale = true_pose(3), 2.5

    def pose(index):
        T = T_other_map @ frames[index].T_map_camera
        T[:3, 3] *= scale
        return MESSAGES.pose(T, stamp(index), 'room')

    bag = write_images(tmp_path / 'bag', extra={'/ground_truth/pose': pose})
    ate = replay(tmp_path / 'out', bag)['ate']
    assert ate['rmse_m'] < 1e-5 and ate['scale'] == pytest.approx(scale, 1e-3)
    assert 'truth: /ground_truth/pose' in capsys.readouterr().out


def test_the_truth_can_be_a_file_a_topic_or_none(tmp_path):
    poses = np.array([true_pose(index) for index in range(NUM)])
    write_tum(tmp_path / 'truth.txt', Trajectory(np.array(STAMPS), poses))
    bag = write_images(tmp_path / 'bag', extra={'/tf': true_tf})
    by_file = replay(tmp_path / 'a', bag, '--ground-truth', tmp_path / 'truth.txt')['ate']
    by_topic = replay(tmp_path / 'b', bag, '--ground-truth', '/tf')['ate']
    assert by_file['rmse_m'] == pytest.approx(by_topic['rmse_m'], 1e-6) and by_file['rmse_m'] > 0
    assert by_file['truth'] == 'truth.txt' and by_topic['truth'].startswith('/tf map')
    assert replay(tmp_path / 'c', bag, '--ground-truth', 'none')['ate'] == ''


def test_an_error_that_cannot_be_computed_says_why(tmp_path, capsys):
    still = MESSAGES.tf([MESSAGES.transform(np.eye(4), stamp(0), 'map', CAMERA_FRAME)])
    bag = write_images(tmp_path / 'bag', extra={'/tf': lambda index: still})
    assert replay(tmp_path / 'out', bag)['ate'].startswith('no ATE: ')
    assert 'no ATE: ' in capsys.readouterr().out


def test_gaps_between_stamps_are_reported(tmp_path):
    bag = write_images(tmp_path / 'bag', indices=[0, 1, 2, 3, 40, 41])
    assert replay(tmp_path / 'out', bag)['gaps'] == (
        '1 gaps between the stamps, the longest 1.233 s after pose 3'
    )


def test_known_intrinsics_of_the_bag_are_used_when_asked_for(tmp_path):
    K = np.array([[90.0, 0, 41], [0, 95, 29], [0, 0, 1]])
    info = MESSAGES.camera_info(K, 60, 80, 0, CAMERA_FRAME)
    bag = write_images(tmp_path / 'bag', extra={'/camera/camera_info': lambda index: info})
    replay(tmp_path / 'a', bag, '--camera-info')
    replay(tmp_path / 'b', bag, '--camera-info', '/camera/camera_info')
    replay(tmp_path / 'c', bag)
    first, named, without = (
        recorded(tmp_path / name)['/stream3r/depth/camera_info'][0].k for name in 'abc'
    )
    assert first[0] == pytest.approx(90 * 56 / 80)
    np.testing.assert_array_equal(first, named)
    assert abs(without[0] - first[0]) > 1


def test_images_are_rectified_when_the_intrinsics_of_the_bag_are_used(tmp_path):
    K, bending = np.array([[70.0, 0, 41], [0, 75, 29], [0, 0, 1]]), (-0.02, 0.008, -0.003, 0.001)
    lens = MESSAGES.camera_info(K, 60, 80, 0, 'c', Lens('equidistant', bending))
    calibrate = Calibrator()
    ideal = MESSAGES.camera_info(calibrate(picture(0), lens).K, 60, 80, 0, 'c')
    bent = write_images(tmp_path / 'bent', extra={'/camera/camera_info': lambda index: lens})
    with BagWriter(tmp_path / 'straight') as bag:
        for index in range(6):
            image = calibrate(picture(index), lens).image
            image = MESSAGES.rgb_image(image, stamp(index), CAMERA_FRAME)
            bag.write('/camera/image_raw', image, stamp(index))
            bag.write('/camera/camera_info', ideal, stamp(index))
    replay(tmp_path / 'a', bent, '--camera-info')
    replay(tmp_path / 'b', tmp_path / 'straight', '--camera-info')
    replay(tmp_path / 'c', bent, '--camera-info', '--set', 'rectify=never')
    runs = [recorded(tmp_path / name) for name in 'abc']
    a, b, c = (run['/stream3r/depth/image'][3].data for run in runs)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    a, b, c = (run['/stream3r/depth/camera_info'][3] for run in runs)
    assert a.distortion_model == b.distortion_model == 'plumb_bob' and not (any(a.d) or any(b.d))
    assert (c.distortion_model, tuple(c.d)) == ('equidistant', bending)
    assert c.k[0] == pytest.approx(70 * c.width / 80)


def test_the_effective_configuration_can_be_fed_back(tmp_path):
    bag = write_images(tmp_path / 'bag')
    replay(tmp_path / 'a', bag, '--set', 'session.window=3', '--set', 'map_frame=site')
    written = yaml.safe_load((tmp_path / 'a' / 'config.yaml').read_text())
    assert written['/**']['ros__parameters']['session']['window'] == 3
    again = ['replay', str(bag), '--output', str(tmp_path / 'b')]
    assert main([*again, '--config', str(tmp_path / 'a' / 'config.yaml')]) == 0
    for file in ('trajectory.tum', 'map.ply', 'bag/bag.mcap', 'config.yaml'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes(), file


def test_listed_photos_all_see_each_other(tmp_path):
    photos = write_photos(tmp_path / 'photos', ['x.png', 'b.png', 'a.png'])
    summary = replay(tmp_path / 'out', *photos)
    assert summary['images_out'] == 3
    config = from_dict(NodeConfig, SETTINGS)
    model = load_configured_model(config.model)
    predictions = reconstruct_photos(model, [picture(8 * k) for k in range(3)], config)
    outputs = Outputs(rosbags_messages(), mapping=config.mapping)
    poses = [outputs.world.T_map_world @ p.T_world_camera.double().numpy() for p in predictions]
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    np.testing.assert_allclose(trajectory.T_world_camera, poses, atol=1e-6)
    assert len(load_ply(tmp_path / 'out' / 'map.ply')) == summary['map_points'] > 0


@pytest.mark.parametrize(
    'names, stamps',
    [
        (['0.png', '9.png', '10.png'], [1_000_000_000, 1_100_000_000, 1_200_000_000]),
        (
            ['1305031102.175304.png', '1305031102.211214.png'],
            [1305031102_175304000, 1305031102_211214000],
        ),
        (
            ['1403636579763555584.png', '1403636579813555456.png'],
            [1403636579763555584, 1403636579813555456],
        ),
    ],
)
def test_a_folder_of_images_is_a_stream_stamped_by_its_names_or_its_rate(tmp_path, names, stamps):
    write_photos(tmp_path / 'images', names)
    replay(tmp_path / 'out', tmp_path / 'images', '--rate', '10')
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == stamps
    frames, *_ = reconstruct([8 * k for k in range(len(names))])
    expected = [frame.T_map_camera for frame in frames]
    np.testing.assert_allclose(trajectory.T_world_camera, expected, atol=1e-6)


def test_a_ros_1_bag_comes_out_in_frames_without_slash(tmp_path):
    bag = write_ros1(tmp_path / 'old.bag', [rgb(index) for index in range(NUM)])
    assert replay(tmp_path / 'out', bag)['images_out'] == NUM
    (edge,) = recorded(tmp_path / 'out')['/tf'][0].transforms
    assert edge.child_frame_id == CAMERA_FRAME
    replay(tmp_path / 'new', write_images(tmp_path / 'bag'))
    for file in ('trajectory.tum', 'map.ply'):
        assert (tmp_path / 'out' / file).read_bytes() == (tmp_path / 'new' / file).read_bytes()


def test_a_video_comes_out_frame_by_frame(tmp_path):
    video = cv2.VideoWriter(
        str(tmp_path / 'video.avi'), cv2.VideoWriter.fourcc(*'MJPG'), 25.0, (80, 60)
    )
    for index in range(NUM):
        video.write(np.ascontiguousarray(picture(index)[..., ::-1]))
    video.release()
    summary = replay(tmp_path / 'out', tmp_path / 'video.avi')
    assert (summary['images_in'], summary['images_out']) == (NUM, NUM)
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    stamps = [1_000_000_000 + 40_000_000 * index for index in range(NUM)]
    assert trajectory.stamps_ns.tolist() == stamps
