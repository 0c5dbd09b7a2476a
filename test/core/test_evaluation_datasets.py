"""Dataset readers: miniatures in the true file formats come back as they were written."""

import numpy as np
import pytest
from dataset_miniatures import (
    HEIGHT,
    MINIATURES,
    NUM_FRAMES,
    WIDTH,
    co3d,
    distance_to_plane_m,
    folder,
    scannet_clip,
    seven_scenes,
    sintel,
    tum,
    tum_clip,
    write,
)

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets import DATASETS, dataset
from stream3r_core.evaluation.datasets.folder import read as read_folder
from stream3r_core.evaluation.datasets.frames import nearest_within, resized_K
from stream3r_core.evaluation.trajectory import Trajectory

WITHOUT_POSES = {'kitti_depth', 'kitti_depth_video', 'nyu'}
WITHOUT_K = {'kitti_depth_video', 'nyu', 'scannet_90'}
WITHOUT_DEPTH = {'kitti_odometry', 'euroc'}
WITH_STAMPS = {
    'tum': 1341846313592026000,
    'tum_90': 1341846313592026000,
    'bonn': 1341846313592026000,
    'bonn_110': 1341846313592026000,
    'euroc': 1403636579763555584,
    'kitti_odometry': 0,
    'folder': 1700000000000000000,
}


@pytest.fixture(params=MINIATURES)
def miniature(request, tmp_path):
    """Name of the dataset, the clip that its reader returns and the scene that was written."""
    write_miniature, clip_name = MINIATURES[request.param]
    scene = write_miniature(tmp_path)
    reader = dataset(request.param)
    assert reader.names(tmp_path) == [clip_name]
    return request.param, reader.read(tmp_path, clip_name), scene


def test_every_dataset_has_a_miniature():
    same_reader = {'7scenes': '7scenes_test'}
    for name in DATASETS:
        covered = same_reader.get(name, name)
        assert covered in MINIATURES or covered.startswith('scannet_'), name


def test_images_come_back_in_order(miniature):
    _, clip, scene = miniature
    assert len(clip) == NUM_FRAMES
    for frame, expected in zip(clip.frames, scene.images):
        image = frame.load_image()
        assert image.dtype == np.uint8 and image.shape == (HEIGHT, WIDTH, 3)
        lossy = frame.image_path.suffix == '.jpg'
        assert np.abs(image.astype(int) - expected).mean() < (4 if lossy else 1e-9)


def test_poses_are_camera_to_world_with_opencv_axes(miniature):
    name, clip, scene = miniature
    if name in WITHOUT_POSES:
        assert clip.truth is None
        return
    poses = np.stack([frame.T_world_camera for frame in clip.frames])
    np.testing.assert_allclose(poses, scene.T_world_camera, atol=1e-6)
    assert len(clip.truth) == NUM_FRAMES
    np.testing.assert_allclose(clip.truth.T_world_camera, scene.T_world_camera, atol=1e-6)


def test_intrinsics_are_in_pixels_of_the_image(miniature):
    name, clip, scene = miniature
    for frame in clip.frames:
        if name in WITHOUT_K:
            assert frame.K is None
        else:
            np.testing.assert_allclose(frame.K, scene.K, rtol=1e-9)


def test_depth_is_metric_and_lies_on_the_true_plane(miniature):
    name, clip, scene = miniature
    for frame, expected, pose in zip(clip.frames, scene.depth_m, scene.T_world_camera):
        if name in WITHOUT_DEPTH:
            assert frame.load_depth_m is None
            continue
        depth = frame.load_depth_m()
        valid = depth > 0
        assert depth.shape == (HEIGHT, WIDTH) and depth.dtype == np.float32
        assert valid.mean() > (0.1 if name == 'dtu' else 0.99)
        np.testing.assert_allclose(depth[valid], expected[valid], atol=3e-3)
        assert distance_to_plane_m(depth, scene.K, pose)[valid].max() < 3e-3


def test_stamps_are_those_of_the_dataset_or_said_to_be_made_up(miniature):
    name, clip, _ = miniature
    stamps = [frame.stamp_ns for frame in clip.frames]
    assert stamps == sorted(set(stamps))
    if name in WITH_STAMPS:
        assert stamps[0] == WITH_STAMPS[name]
    made_up = any('no stamps' in remark for remark in clip.remarks)
    assert made_up == (name not in WITH_STAMPS)


def test_a_foreign_folder_is_refused_with_the_expected_layout(tmp_path):
    (tmp_path / 'holiday').mkdir()
    for name in DATASETS:
        with pytest.raises(DataError, match='expected'):
            dataset(name).names(tmp_path)
        with pytest.raises(DataError, match='not a folder'):
            dataset(name).names(tmp_path / 'none')
    with pytest.raises(DataError, match='known: 7scenes'):
        dataset('imagenet')


def test_the_dtu_mask_is_eroded_by_ten_pixels(tmp_path):
    write_miniature, name = MINIATURES['dtu']
    write_miniature(tmp_path)
    depth = dataset('dtu').read(tmp_path, name).frames[0].load_depth_m()
    # The mask 2..21 x 3..28 shrinks by 5 pixels on one side and 4 on the other.
    inside = np.zeros(depth.shape, bool)
    inside[7:18, 8:25] = True
    assert np.array_equal(depth > 0, inside)


def test_seven_scenes_depth_is_invalid_where_the_protocol_says(tmp_path):
    from PIL import Image

    seven_scenes(tmp_path)
    path = tmp_path / 'chess/seq-03/frame-000000.depth.proj.png'
    raw = np.full((HEIGHT, WIDTH), 2000, np.uint16)
    raw[0, :4] = 65535, 10001, 0, 10000
    Image.fromarray(raw).save(path)
    depth = dataset('7scenes').read(tmp_path, 'chess/seq-03').frames[0].load_depth_m()
    assert depth[0, :5].tolist() == [0, 0, 0, 10, 2]


def test_seven_scenes_without_projected_depth_has_none_and_says_so(tmp_path):
    seven_scenes(tmp_path)
    for path in tmp_path.glob('chess/seq-03/*.depth.proj.png'):
        path.unlink()
    clip = dataset('7scenes').read(tmp_path, 'chess/seq-03')
    assert all(frame.load_depth_m is None for frame in clip.frames)
    assert any('depth is not judged' in remark for remark in clip.remarks)


def test_lost_poses_are_no_poses(tmp_path):
    scene = scannet_clip(tmp_path)
    lines = [' '.join(map(repr, T.ravel().tolist())) for T in scene.T_world_camera]
    lines[1] = ' '.join(['-inf'] * 16)
    write(tmp_path / 'scene0707_00/pose_90.txt', '\n'.join(lines))
    clip = dataset('scannet_90').read(tmp_path, 'scene0707_00')
    assert clip.frames[1].T_world_camera is None
    assert clip.truth.stamps_ns.tolist() == [clip.frames[i].stamp_ns for i in (0, 2)]


def test_scannet_poses_may_stand_in_rows_of_four(tmp_path):
    scene = scannet_clip(tmp_path, 33)
    text = '\n'.join(' '.join(map(repr, row)) for T in scene.T_world_camera.tolist() for row in T)
    write(tmp_path / 'scene0707_00/pose_33.txt', text)
    clip = dataset('scannet_33').read(tmp_path, 'scene0707_00')
    np.testing.assert_allclose(clip.truth.T_world_camera, scene.T_world_camera, atol=1e-12)


def test_co3d_intrinsics_normalised_by_both_sides_are_understood(tmp_path):
    scene = co3d(tmp_path, 'ndc_norm_image_bounds')
    clip = dataset('co3d').read(tmp_path, 'apple/110_13051_23361')
    np.testing.assert_allclose(clip.frames[0].K, scene.K, rtol=1e-9)


def test_full_tum_truth_keeps_its_own_rate_and_far_frames_have_no_pose(tmp_path):
    tum(tmp_path)
    name = 'rgbd_dataset_freiburg3_walking_xyz'
    path = tmp_path / name / 'groundtruth.txt'
    lines = path.read_text().splitlines()
    write(path, '\n'.join([*lines[:3], '1341846399.0 0 0 0 0 0 0 1']))
    clip = dataset('tum').read(tmp_path, name)
    assert clip.frames[2].T_world_camera is None and len(clip.truth) == 3


def test_a_tum_clip_with_fewer_poses_is_associated_by_time(tmp_path):
    scene = tum_clip(tmp_path)
    name = 'rgbd_dataset_freiburg3_sitting_static'
    path = tmp_path / name / 'groundtruth_90.txt'
    stamps = ['1341846313.600000', '1341846313.790000']
    lines = path.read_text().splitlines()
    write(path, '\n'.join(f'{s} {line.split(" ", 1)[1]}' for s, line in zip(stamps, lines[::2])))
    clip = dataset('tum_90').read(tmp_path, name)
    assert clip.frames[1].T_world_camera is None
    np.testing.assert_allclose(clip.frames[2].T_world_camera, scene.T_world_camera[2], atol=1e-6)


def test_a_plain_folder_takes_other_truth_than_what_lies_beside_it(tmp_path):
    scene = folder(tmp_path)
    (tmp_path / 'depth').rename(tmp_path / 'elsewhere')
    (tmp_path / 'groundtruth.txt').rename(tmp_path / 'truth.txt')
    (tmp_path / 'associations.txt').unlink()
    clip = read_folder(tmp_path)
    assert clip.truth is None and clip.frames[0].load_depth_m is None
    write(
        tmp_path / 'kitti.txt',
        '\n'.join(' '.join(map(repr, T[:3].ravel().tolist())) for T in scene.T_world_camera),
    )
    clip = read_folder(tmp_path, '.', tmp_path / 'kitti.txt', tmp_path / 'elsewhere')
    np.testing.assert_allclose(clip.truth.T_world_camera, scene.T_world_camera, atol=1e-12)
    np.testing.assert_allclose(clip.frames[2].load_depth_m(), scene.depth_m[2], atol=1e-3)
    with pytest.raises(DataError, match='named like the images'):
        read_folder(tmp_path, '.', None, tmp_path / 'nowhere')
    assert read_folder(tmp_path, '.', None, 'none').frames[0].load_depth_m is None


@pytest.mark.parametrize('seconds', [True, False])
def test_image_names_that_are_stamps_are_the_stamps(tmp_path, seconds):
    folder(tmp_path)
    (tmp_path / 'associations.txt').unlink()
    stamps = [1_700_000_000_000_000_000 + 133_333_333 * i for i in range(3)]
    for image, stamp in zip(sorted((tmp_path / 'color').iterdir()), stamps):
        name = f'{stamp // 10**9}.{stamp % 10**9:09d}' if seconds else str(stamp)
        image.rename(image.with_name(f'{name}.png'))
    clip = read_folder(tmp_path)
    assert [f.stamp_ns for f in clip.frames] == stamps and clip.remarks == ()
    assert len([f for f in clip.frames if f.T_world_camera is not None]) == 3


def test_another_truth_gives_the_frames_other_poses(tmp_path):
    scene = folder(tmp_path)
    clip = read_folder(tmp_path)
    other = Trajectory(clip.truth.stamps_ns[:2], scene.T_world_camera[1:], 'other')
    replaced = clip.with_truth(other)
    assert replaced.truth is other and replaced.frames[2].T_world_camera is None
    np.testing.assert_array_equal(replaced.frames[0].T_world_camera, scene.T_world_camera[1])
    assert clip.with_truth(None).truth is None
    with pytest.raises(DataError, match='TUM file'):
        clip.with_truth(Trajectory(None, scene.T_world_camera[:2]))


def break_kitti_calibration(root):
    write(root / 'sequences/00/calib.txt', 'P0: 1 2 3')


def break_sintel_tag(root):
    path = root / 'training/camdata_left/alley_2/frame_0002.cam'
    path.write_bytes(b'\0' * len(path.read_bytes()))


def break_replica_camera(root):
    write(root / 'cam_params.json', '{"camera": {"fx": 1}}')


def break_euroc_sensor(root):
    write(root / 'MH_01_easy/mav0/cam0/sensor.yaml', 'sensor_type: imu')


def break_co3d_annotations(root):
    (root / 'apple/frame_annotations.jgz').write_bytes(b'no gzip')


def break_dtu_camera(root):
    write(root / 'scan1/cams/00000001_cam.txt', 'extrinsic\n1 0 0\n')


def break_count_of_poses(root):
    path = root / 'kitchen/poses.txt'
    write(path, '\n'.join(path.read_text().splitlines()[:8]))


def break_numbers(root):
    write(root / 'chess/seq-03/frame-000001.pose.txt', 'lost')


@pytest.mark.parametrize(
    'name, damage, message',
    [
        ('kitti_odometry', break_kitti_calibration, 'P2 with 12 numbers'),
        ('sintel', break_sintel_tag, 'no Sintel file'),
        ('replica', break_replica_camera, 'cam_params'),
        ('euroc', break_euroc_sensor, 'T_BS'),
        ('co3d', break_co3d_annotations, 'CO3Dv2'),
        ('dtu', break_dtu_camera, 'extrinsic'),
        ('neural_rgbd', break_count_of_poses, '2 poses'),
        ('7scenes_test', break_numbers, 'numbers only'),
    ],
)
def test_a_damaged_dataset_is_refused_with_the_file_at_fault(tmp_path, name, damage, message):
    write_miniature, clip_name = MINIATURES[name]
    write_miniature(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        reader = dataset(name)
        reader.names(tmp_path)
        reader.read(tmp_path, clip_name)


def test_damaged_depth_files_are_refused_when_loaded(tmp_path):
    sintel(tmp_path)
    frame = dataset('sintel').read(tmp_path, 'alley_2').frames[0]
    path = tmp_path / 'training/depth/alley_2/frame_0001.dpt'
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match='bytes found'):
        frame.load_depth_m()


def test_an_eight_bit_depth_map_is_refused(tmp_path):
    from PIL import Image

    folder(tmp_path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / 'depth/000000.png')
    with pytest.raises(DataError, match='16-bit'):
        read_folder(tmp_path).frames[0].load_depth_m()


def test_clips_are_thinned_by_step_and_limit(tmp_path):
    folder(tmp_path)
    clip = read_folder(tmp_path)
    assert [f.name for f in clip.every(2).frames] == ['000000.png', '000002.png']
    assert [f.name for f in clip.every(1, 2).frames] == ['000000.png', '000001.png']


def test_nearest_stamps_within_the_tolerance():
    among = np.array([100, 200, 300])
    assert nearest_within(np.array([95, 149, 151, 350, 351]), among, 50).tolist() == [
        *(0, 0, 1, 2, -1)
    ]
    assert nearest_within(np.array([95, 200]), np.array([100]), 5).tolist() == [0, -1]


def test_intrinsics_of_a_resized_image_keep_every_ray():
    K = np.array([[30, 0, 15.5], [0, 31, 11.5], [0, 0, 1.0]])
    half = resized_K(K, (24, 32), (12, 16))
    np.testing.assert_allclose(half, [[15, 0, 7.5], [0, 15.5, 5.5], [0, 0, 1]])
    np.testing.assert_allclose(resized_K(half, (12, 16), (24, 32)), K)
