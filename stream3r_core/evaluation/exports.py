"""Results for other programs: COLMAP text model, GLB with camera frusta, Rerun recording."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError, MissingDependencyError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import write_lines
from stream3r_core.files import atomic_write
from stream3r_core.mapping import MapCloud

MAX_FRUSTA = 300
GLTF_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # glTF: y up, cameras look along -z


@dataclass(frozen=True)
class Camera:
    """One estimated view, in pixels of its image file."""

    name: str  # of its image file, where there is one
    stamp_ns: int
    T_world_camera: np.ndarray  # [4, 4]
    K: np.ndarray  # [3, 3]
    size_hw: tuple[int, int]


def write_colmap(folder: str | Path, cameras: Sequence[Camera], cloud: MapCloud) -> None:
    """Write cameras.txt, images.txt and points3D.txt of a COLMAP text model.

    Every image has a camera of its own; points have no tracks and an unknown error (-1). COLMAP
    puts the centre of the first pixel at 0.5, our K at 0: the principal point moves by that.
    Raises DataError for no camera, and for names that COLMAP cannot tell apart or ends too early.
    """
    if not cameras:
        raise DataError('no camera to write')
    _check_names([camera.name for camera in cameras])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    views = [c.T_world_camera for c in cameras]
    from_world = Trajectory(None, np.linalg.inv(np.stack(views)), 'cameras')
    write_lines(folder / 'cameras.txt', map(_colmap_camera, range(1, len(cameras) + 1), cameras))
    lines = []
    for number, (camera, position, quat_xyzw) in enumerate(
        zip(cameras, from_world.positions_m, from_world.quat_xyzw), 1
    ):
        x, y, z, w = quat_xyzw
        pose = ' '.join(repr(float(v)) for v in (w, x, y, z, *position))
        lines += [f'{number} {pose} {number} {camera.name}', '']
    write_lines(folder / 'images.txt', lines)
    points = zip(cloud.points_xyz.tolist(), cloud.colors_rgb.tolist())
    write_lines(
        folder / 'points3D.txt',
        (
            f'{number} {x:.6g} {y:.6g} {z:.6g} {r} {g} {b} -1'
            for number, ((x, y, z), (r, g, b)) in enumerate(points, 1)
        ),
    )


def _check_names(names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    spaced = [name for name in names if ' ' in name]
    if repeated or spaced:
        name, why = (spaced[0], 'has a space') if spaced else (repeated[0], 'is not the only one')
        raise DataError(
            f'a COLMAP model knows an image by its file name, up to the first space: {name!r} '
            f'{why}; rename the files'
        )


def _colmap_camera(number: int, camera: Camera) -> str:
    height, width = camera.size_hw
    (fx, _, cx), (_, fy, cy), _ = camera.K.tolist()
    return f'{number} PINHOLE {width} {height} {fx!r} {fy!r} {cx + 0.5!r} {cy + 0.5!r}'


def write_glb(path: str | Path, cameras: Sequence[Camera], cloud: MapCloud) -> None:
    """Write the cloud and up to 300 camera frusta as binary glTF, upright for web viewers.

    Raises MissingDependencyError without trimesh.
    """
    try:
        import trimesh
    except ImportError as error:
        raise MissingDependencyError(
            f'a GLB file needs trimesh ({error}): pip install trimesh'
        ) from error
    scene = trimesh.Scene()
    if len(cloud):
        alpha = np.full((len(cloud), 1), 255, np.uint8)
        colors = np.hstack([cloud.colors_rgb, alpha])
        points = _to_gltf(cloud.points_xyz)
        scene.add_geometry(trimesh.PointCloud(points, colors), geom_name='map')
    if cameras:
        step = -(-len(cameras) // MAX_FRUSTA)
        size = _frustum_depth(cameras)
        lines = np.concatenate([_frustum(camera, size) for camera in cameras[::step]])
        segments = _to_gltf(lines.reshape(-1, 3)).reshape(-1, 2, 3)
        path_lines = trimesh.load_path(segments)
        path_lines.colors = np.tile([255, 140, 0, 255], (len(path_lines.entities), 1))
        scene.add_geometry(path_lines, geom_name='cameras')
    with atomic_write(path) as file:
        file.write(scene.export(file_type='glb'))


def _to_gltf(points: np.ndarray) -> np.ndarray:
    return points @ GLTF_FROM_OPENCV[:3, :3]


def _frustum_depth(cameras: Sequence[Camera]) -> float:
    """Length of the drawn frusta: a twentieth of the extent of the path."""
    positions = np.stack([camera.T_world_camera[:3, 3] for camera in cameras])
    return float(np.ptp(positions, axis=0).max()) / 20 or 0.05


def _frustum(camera: Camera, depth: float) -> np.ndarray:
    """Line segments [8, 2, 3] from the camera centre to the image corners and around them."""
    height, width = camera.size_hw
    pixels = [(0, 0, 1), (width - 1, 0, 1), (width - 1, height - 1, 1), (0, height - 1, 1)]
    corners = depth * np.array(pixels) @ np.linalg.inv(camera.K).T
    corners = corners @ camera.T_world_camera[:3, :3].T + camera.T_world_camera[:3, 3]
    centre = np.broadcast_to(camera.T_world_camera[:3, 3], corners.shape)
    return np.concatenate(
        [np.stack([centre, corners], 1), np.stack([corners, np.roll(corners, -1, axis=0)], 1)]
    )


def write_rerun(path: str | Path, cameras: Sequence[Camera], cloud: MapCloud) -> None:
    """Write a Rerun recording: cameras along time, the cloud as it is at the end.

    Raises MissingDependencyError without rerun-sdk.
    """
    try:
        import rerun as rr
    except ImportError as error:
        raise MissingDependencyError(
            f'a Rerun recording needs rerun-sdk ({error}): pip install rerun-sdk'
        ) from error
    recording = rr.RecordingStream('stream3r')
    recording.save(str(path))
    recording.log('world', rr.ViewCoordinates.RDF, static=True)
    recording.log('world/map', rr.Points3D(cloud.points_xyz, colors=cloud.colors_rgb), static=True)
    for camera in cameras:
        recording.set_time('stamp', timestamp=np.datetime64(camera.stamp_ns, 'ns'))
        T, (height, width) = camera.T_world_camera, camera.size_hw
        pose = rr.Transform3D(translation=T[:3, 3], mat3x3=T[:3, :3])
        recording.log('world/camera', pose)
        recording.log(
            'world/camera',
            rr.Pinhole(image_from_camera=camera.K, width=width, height=height),
        )
    recording.flush()
