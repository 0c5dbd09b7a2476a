"""Miniature datasets in their true file formats, showing one slanted plane from three cameras.

Every writer turns OpenCV poses and metric depth into the conventions of its dataset; the readers
must turn them back. Images are noise, so that a mix-up of files is seen.
"""

import gzip
import json
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

HEIGHT, WIDTH = 24, 32
NORMAL, OFFSET_M = np.array([0.15, -0.1, 1.0]), 2.5  # the plane: NORMAL . X = OFFSET_M
NUM_FRAMES = 3


@dataclass
class Scene:
    """The truth of one miniature clip."""

    K: np.ndarray
    seed: int = 0
    size_hw: tuple[int, int] = (HEIGHT, WIDTH)
    num_frames: int = NUM_FRAMES
    images: np.ndarray = field(init=False)  # [3, H, W, 3] uint8
    T_world_camera: np.ndarray = field(init=False)  # [3, 4, 4]
    depth_m: np.ndarray = field(init=False)  # [3, H, W]

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        count = self.num_frames
        self.images = rng.integers(0, 256, (count, *self.size_hw, 3), dtype=np.uint8)
        self.T_world_camera = np.tile(np.eye(4), (count, 1, 1))
        rotvecs = rng.normal(0, 0.1, (count, 3))
        self.T_world_camera[:, :3, :3] = Rotation.from_rotvec(rotvecs).as_matrix()
        self.T_world_camera[:, :3, 3] = rng.normal(0, 0.3, (count, 3))
        self.depth_m = np.stack(
            [plane_depth(T, self.K, self.size_hw) for T in self.T_world_camera]
        )

    @property
    def T_camera_world(self):
        return np.linalg.inv(self.T_world_camera)


def pixel_rays(K, size_hw):
    """K^-1 (u, v, 1) of integer pixels [H, W, 3]."""
    u, v = np.meshgrid(np.arange(size_hw[1]), np.arange(size_hw[0]))
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T


def plane_depth(T_world_camera, K, size_hw):
    rays = pixel_rays(K, size_hw) @ T_world_camera[:3, :3].T
    return (OFFSET_M - NORMAL @ T_world_camera[:3, 3]) / (rays @ NORMAL)


def distance_to_plane_m(depth_m, K, T_world_camera):
    """Distance of the unprojected depth [H, W] to the plane."""
    camera = pixel_rays(K, depth_m.shape) * depth_m[..., None]
    world = camera @ T_world_camera[:3, :3].T + T_world_camera[:3, 3]
    return np.abs(world @ NORMAL - OFFSET_M) / np.linalg.norm(NORMAL)


def save_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_depth(path, depth_m, units_per_m):
    save_png(path, np.round(depth_m * units_per_m).astype(np.uint16))


def save_jpg(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=100, subsampling=0)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def rows(matrix):
    return '\n'.join(' '.join(f'{x:.9e}' for x in row) for row in matrix)


def tum_line(stamp, T):
    quat = Rotation.from_matrix(T[:3, :3]).as_quat()
    return ' '.join([stamp, *(f'{x:.9f}' for x in (*T[:3, 3], *quat))])


def camera(fx=30.0, fy=31.0, cx=15.5, cy=11.0):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def seven_scenes(root, size_hw=(HEIGHT, WIDTH)):
    K = np.array([[525, 0, 320], [0, 525, 240], [0, 0, 1.0]])
    scene = Scene(K, size_hw=size_hw)
    folder = root / 'chess' / 'seq-03'
    for i in range(NUM_FRAMES):
        base = folder / f'frame-{i:06d}'
        save_png(base.with_suffix('.color.png'), scene.images[i])
        save_depth(base.with_suffix('.depth.proj.png'), scene.depth_m[i], 1000)
        save_depth(base.with_suffix('.depth.png'), scene.depth_m[i] * 2, 1000)
        write(base.with_suffix('.pose.txt'), rows(scene.T_world_camera[i]))
    write(root / 'chess' / 'TestSplit.txt', 'sequence3\n')
    write(root / 'chess' / 'TrainSplit.txt', 'sequence1\n')
    (root / 'chess' / 'seq-01').mkdir()
    return scene


def neural_rgbd(root):
    focal = 554.2562584220408
    scene = Scene(np.array([[focal, 0, 320], [0, focal, 240], [0, 0, 1.0]]))
    folder = root / 'kitchen'
    lines = []
    for i in range(NUM_FRAMES):
        save_png(folder / 'images' / f'img{i}.png', scene.images[i])
        save_depth(folder / 'depth' / f'depth{i}.png', scene.depth_m[i], 1000)
        opengl = scene.T_world_camera[i].copy()
        opengl[:, 1:3] *= -1
        lines.append(rows(opengl))
    write(folder / 'poses.txt', '\n'.join(lines))
    return scene


def dtu(root):
    scene = Scene(camera())
    folder = root / 'scan1'
    for i in range(NUM_FRAMES):
        save_jpg(folder / 'images' / f'{i:08d}.jpg', scene.images[i])
        extrinsic = scene.T_camera_world[i].copy()
        extrinsic[:3, 3] *= 1000
        write(
            folder / 'cams' / f'{i:08d}_cam.txt',
            f'extrinsic\n{rows(extrinsic)}\n\nintrinsic\n{rows(scene.K)}\n\n425.0 2.5\n',
        )
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[2:-2, 3:-3] = 255
        save_png(folder / 'binary_masks' / f'{i:08d}.png', mask)
        (folder / 'depths').mkdir(exist_ok=True)
        np.save(folder / 'depths' / f'{i:08d}.npy', (scene.depth_m[i] * 1000).astype(np.float32))
    return scene


TUM_K = np.array([[535.4, 0, 320.1], [0, 539.2, 247.6], [0, 0, 1.0]])


def tum(root, name='rgbd_dataset_freiburg3_walking_xyz', K=TUM_K):
    scene = Scene(K)
    folder = root / name
    rgb, depth, truth = ['# color images'], ['# depth maps'], ['# ground truth']
    for i in range(NUM_FRAMES):
        stamp = f'1341846313.{592026 + 33000 * i:06d}'
        late = f'1341846313.{592088 + 33000 * i:06d}'
        save_png(folder / 'rgb' / f'{stamp}.png', scene.images[i])
        save_depth(folder / 'depth' / f'{late}.png', scene.depth_m[i], 5000)
        rgb.append(f'{stamp} rgb/{stamp}.png')
        depth.append(f'{late} depth/{late}.png')
        truth.append(tum_line(f'1341846313.{592900 + 33000 * i:06d}', scene.T_world_camera[i]))
    for listing, lines in (('rgb', rgb), ('depth', depth), ('groundtruth', truth)):
        write(folder / f'{listing}.txt', '\n'.join(lines))
    return scene


def tum_clip(root, number=90, name='rgbd_dataset_freiburg3_sitting_static', K=TUM_K):
    scene = Scene(K)
    folder = root / name
    truth = []
    for i in range(NUM_FRAMES):
        stamp = f'1341846313.{592026 + 100000 * i:06d}'
        save_png(folder / f'rgb_{number}' / f'{stamp}.png', scene.images[i])
        save_depth(folder / f'depth_{number}' / f'{stamp}.png', scene.depth_m[i], 5000)
        truth.append(tum_line(f'1341846313.{622900 + 100000 * i:06d}', scene.T_world_camera[i]))
    write(folder / f'groundtruth_{number}.txt', '\n'.join(truth))
    return scene


BONN_K = np.array([[542.822841, 0, 315.593520], [0, 542.576870, 237.756098], [0, 0, 1.0]])


def bonn(root):
    return tum(root, 'rgbd_bonn_balloon2', BONN_K)


def bonn_clip(root):
    return tum_clip(root, 110, 'rgbd_bonn_balloon2', BONN_K)


def icl_nuim(root):
    scene = Scene(np.array([[481.2, 0, 319.5], [0, 480.0, 239.5], [0, 0, 1.0]]))
    folder = root / 'living_room_traj0'
    up = np.diag([1.0, -1.0, 1.0, 1.0])
    associations, truth = [], []
    for i in range(NUM_FRAMES):
        save_png(folder / 'rgb' / f'{i + 1}.png', scene.images[i])
        save_depth(folder / 'depth' / f'{i + 1}.png', scene.depth_m[i], 5000)
        associations.append(f'{i + 1} depth/{i + 1}.png {i + 1} rgb/{i + 1}.png')
        truth.append(tum_line(f'{i + 1}', up @ scene.T_world_camera[i] @ up))
    write(folder / 'associations.txt', '\n'.join(associations))
    write(folder / 'livingRoom0.gt.freiburg', '\n'.join(truth))
    return scene


def replica(root):
    scene = Scene(camera())
    (fx, _, cx), (_, fy, cy), _ = scene.K
    numbers = {'w': WIDTH, 'h': HEIGHT, 'fx': fx, 'fy': fy, 'cx': cx, 'cy': cy, 'scale': 6553.5}
    write(root / 'cam_params.json', json.dumps({'camera': numbers}))
    results = root / 'office0' / 'results'
    for i in range(NUM_FRAMES):
        save_jpg(results / f'frame{i:06d}.jpg', scene.images[i])
        save_depth(results / f'depth{i:06d}.png', scene.depth_m[i], 6553.5)
    lines = (' '.join(map(repr, T.ravel().tolist())) for T in scene.T_world_camera)
    write(root / 'office0' / 'traj.txt', '\n'.join(lines))
    return scene


def scannet(root):
    scene = Scene(camera())
    folder = root / 'scene0707_00'
    for i in range(NUM_FRAMES):
        save_jpg(folder / 'color' / f'{i}.jpg', scene.images[i])
        save_depth(folder / 'depth' / f'{i}.png', scene.depth_m[i], 1000)
        write(folder / 'pose' / f'{i}.txt', rows(scene.T_world_camera[i]))
    K = np.eye(4)
    K[:3, :3] = scene.K
    write(folder / 'intrinsic' / 'intrinsic_color.txt', rows(K))
    return scene


def scannet_clip(root, number=90):
    scene = Scene(camera())
    folder = root / 'scene0707_00'
    for i in range(NUM_FRAMES):
        save_jpg(folder / f'color_{number}' / f'frame_{i:04d}.jpg', scene.images[i])
        save_depth(folder / f'depth_{number}' / f'frame_{i:04d}.png', scene.depth_m[i], 1000)
    poses = '\n'.join(' '.join(map(repr, T.ravel().tolist())) for T in scene.T_world_camera)
    write(folder / f'pose_{number}.txt', poses)
    return scene


def sintel(root):
    scene = Scene(camera())
    training = root / 'training'
    tag = np.array([202021.25], '<f4').tobytes()
    for i in range(NUM_FRAMES):
        name = f'frame_{i + 1:04d}'
        save_png(training / 'final' / 'alley_2' / f'{name}.png', scene.images[i])
        cam = training / 'camdata_left' / 'alley_2' / f'{name}.cam'
        dpt = training / 'depth' / 'alley_2' / f'{name}.dpt'
        for path in (cam, dpt):
            path.parent.mkdir(parents=True, exist_ok=True)
        extrinsic = scene.T_camera_world[i][:3]
        cam.write_bytes(tag + scene.K.astype('<f8').tobytes() + extrinsic.astype('<f8').tobytes())
        size = np.array([WIDTH, HEIGHT], '<i4').tobytes()
        dpt.write_bytes(tag + size + scene.depth_m[i].astype('<f4').tobytes())
    return scene


def kitti_odometry(root):
    scene = Scene(camera())
    folder = root / 'sequences' / '00'
    shift = np.array([0.06, -0.001, 0.003])  # camera 0 to camera 2
    to_grey = np.eye(4)
    to_grey[:3, 3] = shift
    P = {c: np.zeros((3, 4)) for c in range(4)}
    for matrix in P.values():
        matrix[:, :3] = scene.K
    P[2][:, 3] = scene.K @ shift
    lines = [f'P{c}: {" ".join(f"{x:.12e}" for x in P[c].ravel())}' for c in P]
    write(folder / 'calib.txt', '\n'.join(lines))
    write(folder / 'times.txt', '\n'.join(f'{0.1037 * i:.6e}' for i in range(NUM_FRAMES)))
    for i in range(NUM_FRAMES):
        save_png(folder / 'image_2' / f'{i:06d}.png', scene.images[i])
    grey = scene.T_world_camera @ to_grey
    lines = (' '.join(f'{x:.9e}' for x in T[:3].ravel()) for T in grey)
    write(root / 'poses' / '00.txt', '\n'.join(lines))
    return scene


KITTI_SELECTION = ('depth_selection', 'val_selection_cropped')


def kitti_depth(root):
    scene = Scene(camera())
    folder = root.joinpath(*KITTI_SELECTION)
    for i in range(NUM_FRAMES):
        image = f'2011_09_26_drive_0002_sync_image_{i:010d}_image_02'
        depth = f'2011_09_26_drive_0002_sync_groundtruth_depth_{i:010d}_image_02'
        save_png(folder / 'image' / f'{image}.png', scene.images[i])
        save_depth(folder / 'groundtruth_depth' / f'{depth}.png', scene.depth_m[i], 256)
        write(folder / 'intrinsics' / f'{image}.txt', ' '.join(map(str, scene.K.ravel())))
    return scene


def kitti_depth_video(root):
    scene = Scene(camera())
    folder = root.joinpath(*KITTI_SELECTION)
    name = '2011_09_26_drive_0002_sync_02'
    for i in range(NUM_FRAMES):
        save_png(folder / 'image_gathered' / name / f'{i:010d}.png', scene.images[i])
        depth = folder / 'groundtruth_depth_gathered' / name / f'{i:010d}.png'
        save_depth(depth, scene.depth_m[i], 256)
    return scene


def nyu(root):
    scene = Scene(camera())
    for i in range(NUM_FRAMES):
        save_png(root / 'val' / 'nyu_images' / f'{9 + i}.png', scene.images[i])
        (root / 'val' / 'nyu_depths').mkdir(exist_ok=True)
        np.save(root / 'val' / 'nyu_depths' / f'{9 + i}.npy', scene.depth_m[i].astype(np.float32))
    return scene


def euroc(root):
    scene = Scene(camera())
    mav = root / 'MH_01_easy' / 'mav0'
    T_body_camera = np.eye(4)
    T_body_camera[:3, :3] = Rotation.from_rotvec([0.1, -0.2, 1.5]).as_matrix()
    T_body_camera[:3, 3] = [-0.02, -0.06, 0.01]
    images, truth = ['#timestamp [ns],filename'], ['#timestamp, p_RS_R_x [m], ...']
    for i in range(NUM_FRAMES):
        stamp = 1403636579763555584 + 50_000_000 * i
        save_png(mav / 'cam0' / 'data' / f'{stamp}.png', scene.images[i])
        images.append(f'{stamp},{stamp}.png')
        body = scene.T_world_camera[i] @ np.linalg.inv(T_body_camera)
        x, y, z, w = Rotation.from_matrix(body[:3, :3]).as_quat()
        numbers = [*body[:3, 3], w, x, y, z, *[0.0] * 9]
        truth.append(','.join([str(stamp + 1_000_000), *(f'{n:.9f}' for n in numbers)]))
    write(mav / 'cam0' / 'data.csv', '\n'.join(images))
    write(mav / 'state_groundtruth_estimate0' / 'data.csv', '\n'.join(truth))
    (fx, _, cx), (_, fy, cy), _ = scene.K
    write(
        mav / 'cam0' / 'sensor.yaml',
        '#Camera extrinsics wrt. the body-frame.\nsensor_type: camera\nT_BS:\n  cols: 4\n'
        f'  rows: 4\n  data: {T_body_camera.ravel().tolist()}\nrate_hz: 20\n'
        f'camera_model: pinhole\nintrinsics: [{fx}, {fy}, {cx}, {cy}] #fu, fv, cu, cv\n',
    )
    return scene


def co3d(root, intrinsics_format='ndc_isotropic', num_frames=NUM_FRAMES):
    scene = Scene(camera(), num_frames=num_frames)
    half = np.array([WIDTH, HEIGHT]) / 2
    scale = np.full(2, half.min()) if intrinsics_format == 'ndc_isotropic' else half
    entries = []
    for i in range(num_frames):
        image = f'apple/110_13051_23361/images/frame{i + 1:06d}.jpg'
        depth = f'apple/110_13051_23361/depths/frame{i + 1:06d}.jpg.geometric.png'
        save_jpg(root / image, scene.images[i])
        adjustment = 1.5
        bits = (scene.depth_m[i] / adjustment).astype(np.float16).view(np.uint16)
        save_png(root / depth, bits)
        R, t = scene.T_camera_world[i][:3, :3].T.copy(), scene.T_camera_world[i][:3, 3].copy()
        R[:, :2] *= -1
        t[:2] *= -1
        entries.append(
            {
                'sequence_name': '110_13051_23361',
                'frame_number': i + 1,
                'image': {'path': image, 'size': [HEIGHT, WIDTH]},
                'depth': {'path': depth, 'scale_adjustment': adjustment},
                'viewpoint': {
                    'R': R.tolist(),
                    'T': t.tolist(),
                    'focal_length': (scene.K[[0, 1], [0, 1]] / scale).tolist(),
                    'principal_point': ((half - scene.K[:2, 2]) / scale).tolist(),
                    'intrinsics_format': intrinsics_format,
                },
            }
        )
    with gzip.open(root / 'apple' / 'frame_annotations.jgz', 'wt') as file:
        json.dump(entries[::-1], file)
    return scene


def folder(root):
    scene = Scene(camera())
    associations, truth = [], ['# stamp tx ty tz qx qy qz qw']
    for i in range(NUM_FRAMES):
        stamp = f'1700000000.{133333333 * i:09d}'
        save_png(root / 'color' / f'{i:06d}.png', scene.images[i])
        save_depth(root / 'depth' / f'{i:06d}.png', scene.depth_m[i], 1000)
        associations.append(f'{stamp} color/{i:06d}.png {stamp} depth/{i:06d}.png')
        truth.append(tum_line(stamp, scene.T_world_camera[i]))
    write(root / 'associations.txt', '\n'.join(associations))
    write(root / 'groundtruth.txt', '\n'.join(truth))
    (fx, _, cx), (_, fy, cy), _ = scene.K
    content = {'color': {'width': WIDTH, 'height': HEIGHT, 'fx': fx, 'fy': fy, 'cx': cx, 'cy': cy}}
    write(root / 'intrinsics.json', json.dumps(content))
    return scene


MINIATURES = {
    '7scenes_test': (seven_scenes, 'chess/seq-03'),
    'neural_rgbd': (neural_rgbd, 'kitchen'),
    'dtu': (dtu, 'scan1'),
    'tum': (tum, 'rgbd_dataset_freiburg3_walking_xyz'),
    'tum_90': (tum_clip, 'rgbd_dataset_freiburg3_sitting_static'),
    'bonn': (bonn, 'rgbd_bonn_balloon2'),
    'bonn_110': (bonn_clip, 'rgbd_bonn_balloon2'),
    'icl_nuim': (icl_nuim, 'living_room_traj0'),
    'replica': (replica, 'office0'),
    'scannet': (scannet, 'scene0707_00'),
    'scannet_90': (scannet_clip, 'scene0707_00'),
    'sintel': (sintel, 'alley_2'),
    'kitti_odometry': (kitti_odometry, '00'),
    'kitti_depth': (kitti_depth, 'val_selection_cropped'),
    'kitti_depth_video': (kitti_depth_video, '2011_09_26_drive_0002_sync_02'),
    'nyu': (nyu, 'val'),
    'euroc': (euroc, 'MH_01_easy'),
    'co3d': (co3d, 'apple/110_13051_23361'),
    'folder': (folder, '.'),
}
