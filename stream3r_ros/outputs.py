"""What leaves the system about a stream of frames, as messages: the same from node and replay.

Frames: ``world`` is the session's frame (the first camera, optical axes). ``map`` is the frame of
all messages but those that lie in the camera frame; :class:`WorldInMap` stands between the two,
here and nowhere else.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from stream3r_core.config import MappingConfig
from stream3r_core.geometry import matrix_to_quat_xyzw, unproject
from stream3r_core.mapping import MapChange, MapCloud, MapView, OccupancyGrid
from stream3r_core.mapping.filters import reliable_pixels
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import Uncertainty, mean_confidence, median_depth
from stream3r_ros.conversions import PINHOLE, Lens
from stream3r_ros.conversions import stamp_ns as stamp_ns_of
from stream3r_ros.messages import MessageFactory
from stream3r_ros.odometry import UNKNOWN, Sigmas, Twist, body_covariance, body_twist
from stream3r_ros.qos import LATCHED, Qos
from stream3r_ros.tf import T_BODY_OPTICAL, Carrier

Points = TypeVar('Points', MapCloud, MapChange)


class Topic(NamedTuple):
    """Type and offered quality of service of an output topic."""

    type: str
    qos: Qos = Qos(depth=5)


TOPICS = {
    '/tf': Topic('tf2_msgs/msg/TFMessage', Qos(depth=100)),
    '~/pose': Topic('geometry_msgs/msg/PoseStamped'),
    '~/odometry': Topic('nav_msgs/msg/Odometry'),
    '~/depth/image': Topic('sensor_msgs/msg/Image'),
    '~/depth/confidence': Topic('sensor_msgs/msg/Image'),
    '~/depth/sigma': Topic('sensor_msgs/msg/Image'),
    '~/depth/camera_info': Topic('sensor_msgs/msg/CameraInfo'),
    '~/cloud': Topic('sensor_msgs/msg/PointCloud2'),
    '~/path': Topic('nav_msgs/msg/Path', LATCHED),
    '~/map': Topic('sensor_msgs/msg/PointCloud2', LATCHED),
    '~/map_changes': Topic('sensor_msgs/msg/PointCloud2', Qos(depth=50)),
    '~/occupancy_grid': Topic('nav_msgs/msg/OccupancyGrid', LATCHED),
}


@dataclasses.dataclass(frozen=True, eq=False)
class WorldInMap:
    """Where the world lies in the map, at one moment.

    It is replaced, never changed: whatever is made with one is of one piece, in any thread.
    """

    T_map_world: np.ndarray  # [4, 4]
    scale: float = 1.0  # map units per scene unit: metres where the scale is known, else 1

    def poses(self, T_world_camera: np.ndarray) -> np.ndarray:
        """Return T_map_camera [..., 4, 4] of poses in the world frame, in map units."""
        scaled = np.array(T_world_camera, np.float64)
        scaled[..., :3, 3] *= self.scale
        return self.T_map_world @ scaled

    def cloud(self, cloud: Points) -> Points:
        """Move a cloud from the world frame into the map frame, for messages and files."""
        T, scale = self.T_map_world.astype(np.float32), np.float32(self.scale)
        points_xyz = (scale * cloud.points_xyz) @ T[:3, :3].T + T[:3, 3]
        return dataclasses.replace(cloud, points_xyz=points_xyz)


class Outputs:
    """Turns predictions and the map into messages in the map frame.

    With the default ``T_map_world`` the first camera looks along the map's x axis with z up, so
    that a camera held level gives an upright map. ``max_path_poses`` bounds the path: the oldest
    poses leave it. ``mapping`` says which pixels are good enough for a cloud, ``uncertainty`` how
    large errors are (None: not known).
    """

    def __init__(
        self,
        messages: MessageFactory,
        map_frame: str = 'map',
        T_map_world: np.ndarray = T_BODY_OPTICAL,  # [4, 4]
        max_path_poses: int = 1000,
        mapping: MappingConfig | None = None,
        uncertainty: Uncertainty | None = None,
    ):
        self.messages = messages
        self.map_frame = map_frame
        self._world = WorldInMap(T_map_world)
        self.mapping = mapping or MappingConfig()
        self.uncertainty = uncertainty
        self.num_frames = 0  # since the session began
        self._before: tuple[int, np.ndarray] | None = None  # stamp and T_world_camera
        self._poses: deque[Any] = deque(maxlen=max_path_poses)

    def reset(self) -> None:
        """Forget the path; the next frame is the first of a new session, of unknown scale."""
        self._poses.clear()
        self.lay(self._world.T_map_world)
        self.num_frames, self._before = 0, None

    @property
    def world(self) -> WorldInMap:
        """Where the world lies in the map now; another object whenever that changes."""
        return self._world

    def lay(self, T_map_world: np.ndarray) -> None:
        """Say where the world [4, 4] of a new session lies in the map; its scale is unknown."""
        self._world = WorldInMap(T_map_world)

    @property
    def max_path_poses(self) -> int:
        """Poses that the path keeps, the newest ones."""
        return self._poses.maxlen

    def set_scale(self, scale: float) -> None:
        """Give everything from now on, and the path so far, another scale; map origin fixed."""
        before = self._world
        ratio, origin = scale / before.scale, before.T_map_world[:3, 3]
        self._world = dataclasses.replace(before, scale=scale)
        for pose in self._poses:
            position = pose.pose.position
            for axis, start in zip('xyz', origin.tolist()):
                setattr(position, axis, start + ratio * (getattr(position, axis) - start))

    def add(
        self, prediction: FramePrediction, camera_frame: str, lens: Lens = PINHOLE
    ) -> 'FrameOutputs':
        """Append the frame to the path and return its messages, which are built when asked for.

        ``prediction`` lies on the CPU and has a stamp; ``camera_frame`` is its image's frame_id,
        ``lens`` the distortion that the image had when the network saw it.
        """
        frame = FrameOutputs(self, prediction, camera_frame, lens, self.num_frames, self._before)
        self._poses.append(frame.pose)
        self.num_frames += 1
        self._before = prediction.stamp_ns, prediction.T_world_camera.numpy()
        return frame

    def correct(self, stamps_ns: np.ndarray, T_world_camera: np.ndarray) -> None:
        """Move the path to where its frames lie now; every pose keeps its stamp.

        ``stamps_ns`` [n], ``T_world_camera`` [n, 4, 4]; frames that are not named stay.
        """
        newest = slice(-self.max_path_poses, None)
        stamps_ns, T_world_camera = stamps_ns[newest], T_world_camera[newest]
        T_map_camera = self._world.poses(T_world_camera)
        quats_xyzw = matrix_to_quat_xyzw(torch.from_numpy(T_map_camera[:, :3, :3])).tolist()
        positions = T_map_camera[:, :3, 3].tolist()
        row_of = {stamp: row for row, stamp in enumerate(stamps_ns.tolist())}
        for pose in self._poses:
            row = row_of.get(stamp_ns_of(pose))
            if row is not None:
                _set(pose.pose.position, 'xyz', positions[row])
                _set(pose.pose.orientation, 'xyzw', quats_xyzw[row])
        if self._before is not None and self._before[0] in row_of:
            self._before = self._before[0], T_world_camera[row_of[self._before[0]]]

    def path(self, stamp_ns: int) -> Any:
        """Return the nav_msgs/Path of the recent poses, each with its own stamp."""
        return self.messages.path(self._poses, stamp_ns, self.map_frame)

    def map(
        self, cloud: MapCloud | MapView, stamp_ns: int, world: WorldInMap | None = None
    ) -> Any:
        """Return the map, given in the world frame, as PointCloud2 in the map frame.

        It is moved block by block, straight into the message; ``world`` is where it lies, by
        default :attr:`world`.
        """
        moved = map((world or self.world).cloud, cloud.blocks())
        return self.messages.cloud_of_blocks(len(cloud), moved, stamp_ns, self.map_frame)

    def map_changes(
        self, change: MapChange, stamp_ns: int, max_points: int, world: WorldInMap | None = None
    ) -> Iterator[Any]:
        """Yield changes, given in the world frame, as messages of at most ``max_points``.

        An empty message goes before a complete map: forget all voxels that came earlier.
        """
        moved = (world or self.world).cloud(change)
        if change.is_complete:
            yield self.messages.voxels(_rows(moved, slice(0)), stamp_ns, self.map_frame)
        for start in range(0, len(change.voxel_ids), max_points):
            rows = slice(start, start + max_points)
            yield self.messages.voxels(_rows(moved, rows), stamp_ns, self.map_frame)

    def occupancy_grid(self, grid: OccupancyGrid, stamp_ns: int) -> Any:
        """Return a grid, which lies in the map frame already, as nav_msgs/OccupancyGrid."""
        return self.messages.occupancy_grid(
            grid.values, grid.resolution, (*grid.origin_xy, grid.floor_z), stamp_ns, self.map_frame
        )


def _set(target: Any, names: str, values: list[float]) -> None:
    for name, value in zip(names, values):
        setattr(target, name, value)


def _rows(change: MapChange, rows: slice) -> MapChange:
    columns = ('voxel_ids', 'points_xyz', 'colors_rgb', 'confidence', 'weight')
    return dataclasses.replace(change, **{name: getattr(change, name)[rows] for name in columns})


class FrameOutputs:
    """The messages of one frame; all carry the stamp of its image."""

    def __init__(
        self,
        outputs: Outputs,
        prediction: FramePrediction,
        camera_frame: str,
        lens: Lens,
        frames: int,
        before: tuple[int, np.ndarray] | None,
    ):
        """``frames`` went before; ``before``: stamp and T_world_camera of the last of them."""
        self._outputs, self._world = outputs, outputs.world
        self._lens, self._frames, self._before = lens, frames, before
        self._messages, self._mapping = outputs.messages, outputs.mapping
        self._prediction = prediction
        self._depth = prediction.depth * self._world.scale
        self._camera_header = (prediction.stamp_ns, camera_frame)
        self.stamp_ns = prediction.stamp_ns
        self.camera_frame = camera_frame
        self.T_map_camera = self._world.poses(prediction.T_world_camera.numpy())

    def message(self, topic: str) -> Any:
        """Return the message of a name in :data:`TOPICS`, but for the path and the map."""
        return _BUILDERS[topic](self)

    @cached_property
    def pose(self) -> Any:
        """The camera in the map frame as PoseStamped."""
        return self._messages.pose(self.T_map_camera, self.stamp_ns, self._outputs.map_frame)

    def tf(self, carrier: Carrier | None = None) -> Any:
        """Return the one transform map -> carrier of the camera; None: the camera itself."""
        carrier = carrier or Carrier(self.camera_frame, np.eye(4))
        transform = self._messages.transform(
            self.T_map_camera @ np.linalg.inv(carrier.T_carrier_camera),
            self.stamp_ns,
            self._outputs.map_frame,
            carrier.frame,
        )
        return self._messages.tf([transform])

    def odometry(self, body: Carrier | None = None) -> Any:
        """Return pose and velocity of a body that carries the camera; None: of the camera.

        The first frame of a session has no velocity: its covariance says that it is unknown.
        """
        body = body or Carrier(self.camera_frame, np.eye(4))
        T_camera_body = np.linalg.inv(body.T_carrier_camera)
        T_map_body = self.T_map_camera @ T_camera_body
        lever = T_map_body[:3, 3] - self.T_map_camera[:3, 3]
        twist, covariance = self._twist(T_map_body, T_camera_body)
        return self._messages.odometry(
            T_map_body,
            body_covariance(self.sigmas, lever),
            twist.linear,
            twist.angular,
            covariance,
            self.stamp_ns,
            self._outputs.map_frame,
            body.frame,
        )

    def _twist(
        self, T_map_body: np.ndarray, T_camera_body: np.ndarray
    ) -> tuple[Twist, np.ndarray]:
        if self._before is None:
            return Twist(np.zeros(3), np.zeros(3)), UNKNOWN
        stamp_ns, T_world_before = self._before
        seconds = (self.stamp_ns - stamp_ns) / 1e9
        T_map_before = self._world.poses(T_world_before) @ T_camera_body
        lever = -np.linalg.inv(T_camera_body)[:3, 3]  # from camera to body, axes of the body
        step = self._sigmas('step_translation', 'step_rotation')
        covariance = body_covariance(step, lever)
        if step is not None:
            covariance = covariance / seconds**2
        return body_twist(T_map_before, T_map_body, seconds), covariance

    @cached_property
    def sigmas(self) -> Sigmas | None:
        """Standard deviations of the camera's pose; None: not known."""
        return self._sigmas('translation', 'rotation')

    def _sigmas(self, translation: str, rotation: str) -> Sigmas | None:
        fitted = self._outputs.uncertainty
        if fitted is None:
            return None
        parts, turn = (
            getattr(fitted, name).sigma(self._confidence, self._frames)
            for name in (translation, rotation)
        )
        return Sigmas(float(parts * median_depth(self._depth)), float(turn))

    @cached_property
    def _confidence(self) -> float:
        return mean_confidence(self._prediction.depth_conf)

    def depth_sigma(self) -> Any:
        """Return the standard deviation of each depth; NaN where it is not known."""
        fitted, depth = self._outputs.uncertainty, self._depth.numpy()
        sigma = np.full_like(depth, np.nan)
        if fitted is not None:
            valid = depth > 0
            confidence = self._prediction.depth_conf.numpy()[valid]
            sigma[valid] = depth[valid] * fitted.depth.sigma(confidence)
        return self._messages.float_image(sigma, *self._camera_header)

    def depth(self) -> Any:
        """Return the depth along the optical axis, NaN where there is none."""
        depth = self._depth.numpy()
        return self._messages.float_image(np.where(depth > 0, depth, np.nan), *self._camera_header)

    def depth_confidence(self) -> Any:
        """Return the network's confidence of each depth, >= 1."""
        return self._messages.float_image(
            self._prediction.depth_conf.numpy(), *self._camera_header
        )

    def camera_info(self) -> Any:
        """Return the intrinsics of the depth image, and what distortion is left in it."""
        height, width = self._prediction.depth.shape
        return self._messages.camera_info(
            self._prediction.K.numpy(), height, width, *self._camera_header, self._lens
        )

    def cloud(self) -> Any:
        """Return the unprojected depth of the reliable pixels in the camera frame.

        As the map, it takes the camera for a pinhole, whatever distortion is left.
        """
        p = self._prediction
        confidence = p.depth_conf.numpy()
        keep = reliable_pixels(p.depth.numpy(), confidence, self._mapping)
        points_camera = unproject(self._depth, p.K).numpy()[keep]
        return self._messages.cloud(
            points_camera, p.rgb.numpy()[keep], confidence[keep], *self._camera_header
        )


_BUILDERS = {
    '/tf': FrameOutputs.tf,
    '~/pose': lambda frame: frame.pose,
    '~/odometry': FrameOutputs.odometry,
    '~/depth/image': FrameOutputs.depth,
    '~/depth/confidence': FrameOutputs.depth_confidence,
    '~/depth/sigma': FrameOutputs.depth_sigma,
    '~/depth/camera_info': FrameOutputs.camera_info,
    '~/cloud': FrameOutputs.cloud,
}
FRAME_TOPICS = tuple(_BUILDERS)
