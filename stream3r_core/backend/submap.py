"""A submap: what one session has seen, in the frame and unit of its first camera."""

from dataclasses import replace

import numpy as np

from stream3r_core.backend import sim3
from stream3r_core.backend.keyframes import Keyframe
from stream3r_core.config import MappingConfig
from stream3r_core.mapping import MapCloud, VoxelMap, VoxelRows
from stream3r_core.mapping.voxel_index import CELL_LIMIT, group_keys, pack_cells
from stream3r_core.types import FramePrediction

NO_STAMP = np.iinfo(np.int64).min
EMPTY = MapCloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))


class Submap:
    """Frames, keyframes and points of one session; open while frames come, then closed."""

    def __init__(self, key: int, mapping: MappingConfig | None = None):
        self.key = key
        self.keyframes: list[Keyframe] = []
        self.path_length = 0.0  # of the camera, submap units
        self.voxel_size = 0.0  # 0: not known yet
        self._frames: list[tuple[int, int, np.ndarray]] = []  # (frame_id, stamp_ns, pose)
        self._voxels = None if mapping is None else VoxelMap(mapping)
        self._cloud = EMPTY
        self._last_position: np.ndarray | None = None

    @property
    def is_open(self) -> bool:
        """Whether frames may still be added."""
        return self._voxels is not None

    @property
    def num_points(self) -> int:
        """Points of the submap."""
        return self._voxels.num_points if self._voxels else len(self._cloud)

    @property
    def num_rows(self) -> int:
        """Rows of points in use, with those removed from an open submap."""
        return self._voxels.num_rows if self._voxels else len(self._cloud)

    @property
    def num_frames(self) -> int:
        """Frames whose pose is kept."""
        return len(self._frames)

    @property
    def cloud(self) -> MapCloud:
        """Points in the submap's frame."""
        return self._voxels.points() if self._voxels else self._cloud

    @property
    def point_version(self) -> int:
        """Counts the changes of the points while the submap is open; -1 when it is closed."""
        return self._voxels.version if self._voxels else -1

    def rows_since(self, point_version: int) -> VoxelRows:
        """Points that changed after a version of an open submap; all of a closed one."""
        if self._voxels:
            return self._voxels.rows_since(point_version)
        return VoxelRows(np.arange(len(self._cloud)), self._cloud, self._cloud.confidence)

    @property
    def frame_ids(self) -> np.ndarray:
        """Frames [n], in their order."""
        return np.array([frame[0] for frame in self._frames], np.int64)

    @property
    def stamps_ns(self) -> np.ndarray:
        """Stamps [n] int64; ``NO_STAMP`` where a frame had none."""
        return np.array([frame[1] for frame in self._frames], np.int64)

    @property
    def T_submap_camera(self) -> np.ndarray:
        """Rigid poses [n, 4, 4] of the frames, submap units."""
        return np.array([frame[2] for frame in self._frames]).reshape(-1, 4, 4)

    def visit(self, view: Keyframe) -> float:
        """Count the way to this view; return the path so far, submap units."""
        position = view.T_submap_camera[:3, 3]
        if self._last_position is not None:
            self.path_length += float(np.linalg.norm(position - self._last_position))
        self._last_position = position
        return self.path_length

    def configure(self, mapping: MappingConfig) -> None:
        """Give an open submap other thresholds for the points to come."""
        if self._voxels:
            self._voxels.config = mapping

    def add(self, prediction: FramePrediction, view: Keyframe) -> None:
        """Take in a frame: its pose and, unless it is still, its points."""
        stamp = NO_STAMP if view.stamp_ns is None else view.stamp_ns
        self._frames.append((view.frame_id, stamp, view.T_submap_camera))
        if self._voxels and not prediction.still:
            self._voxels.integrate(prediction)
            self.voxel_size = self._voxels.voxel_size or 0.0

    def close(self) -> None:
        """Keep the points, give back the memory reserved for more."""
        if self._voxels:
            self._cloud, self._voxels = self._voxels.points(), None

    def restore(self, frames, cloud: MapCloud, voxel_size: float) -> None:
        """Fill a closed submap: frames (frame_id, stamp_ns, pose [4, 4]) and points."""
        self._frames, self._cloud, self.voxel_size = list(frames), cloud, voxel_size

    def absorb(self, other: 'Submap', S_self_other: np.ndarray) -> None:
        """Make the frames, keyframes and points of another closed submap rigid parts of this."""
        frames = [
            (number, stamp, sim3.rigid_of(S_self_other @ T)) for number, stamp, T in other._frames
        ]
        self._frames = sorted([*self._frames, *frames], key=lambda frame: frame[0])
        moved = [keyframe.moved(S_self_other) for keyframe in other.keyframes]
        self.keyframes = sorted([*self.keyframes, *moved], key=lambda k: k.frame_id)
        scale = float(sim3.scale_of(S_self_other))
        self.path_length += scale * other.path_length
        self.voxel_size = max(self.voxel_size, scale * other.voxel_size)
        points = sim3.act(S_self_other, other._cloud.points_xyz)
        both = MapCloud(
            np.concatenate([self._cloud.points_xyz, points]),
            np.concatenate([self._cloud.colors_rgb, other._cloud.colors_rgb]),
            np.concatenate([self._cloud.confidence, other._cloud.confidence]),
        )
        self._cloud = thin_cloud(both, self.voxel_size)

    def coarsen(self, max_points: int) -> None:
        """Average points of a closed submap in larger voxels, to at most ``max_points``."""
        if len(self._cloud) > max_points and not self.voxel_size:
            extent = np.ptp(self._cloud.points_xyz, axis=0).max()
            self.voxel_size = float(extent) / 1000 or 1.0
        while len(self._cloud) > max_points:
            self.voxel_size *= 1.25
            self._cloud = thin_cloud(self._cloud, self.voxel_size)

    def keep_frames(self, frame_ids: set[int]) -> None:
        """Forget the poses of all other frames."""
        self._frames = [frame for frame in self._frames if frame[0] in frame_ids]

    def keep_images(self, frame_ids: set[int]) -> None:
        """Drop the images of all other keyframes."""
        self.keyframes = [
            k if k.image_rgb is None or k.frame_id in frame_ids else replace(k, image_rgb=None)
            for k in self.keyframes
        ]


def thin_cloud(cloud: MapCloud, voxel_size: float) -> MapCloud:
    """One point per voxel, the confidence-weighted mean; all points if ``voxel_size`` is 0.

    Points farther than about a million voxels from the origin are left out, as in the voxel map.
    """
    if not voxel_size or not len(cloud):
        return cloud
    cells = np.floor(cloud.points_xyz.T.astype(np.float64) / voxel_size)
    inside = (np.abs(cells) < CELL_LIMIT).all(0)
    members, group = group_keys(pack_cells(cells[:, inside]))
    weight = cloud.confidence[inside].astype(np.float64)
    total = np.bincount(group, weight, len(members))

    def mean(planes: np.ndarray) -> np.ndarray:
        sums = [np.bincount(group, plane[inside] * weight, len(members)) for plane in planes.T]
        return np.stack(sums, 1) / total[:, None]

    return MapCloud(
        mean(cloud.points_xyz).astype(np.float32),
        (mean(cloud.colors_rgb) + 0.5).astype(np.uint8),
        (total / np.bincount(group, minlength=len(members))).astype(np.float32),
    )
