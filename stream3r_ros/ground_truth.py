"""The true trajectory that a bag carries: for evaluation only, never an input of a network."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from stream3r_core.errors import DataError, InputError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_ros.bag import BagReader, BagTopic
from stream3r_ros.conversions import pose_from_message, stamp_ns

TF_TYPES = ('tf2_msgs/msg/TFMessage', 'tf/msg/tfMessage')  # the second: old ROS 1 bags
STATIC_TF_TOPIC = '/tf_static'
POSE_TYPES = {
    'geometry_msgs/msg/PoseStamped': lambda m: m.pose,
    'geometry_msgs/msg/PoseWithCovarianceStamped': lambda m: m.pose.pose,
    'nav_msgs/msg/Odometry': lambda m: m.pose.pose,
    'geometry_msgs/msg/TransformStamped': lambda m: m.transform,
}
TRUTH_TYPES = (*TF_TYPES, *POSE_TYPES)
_SAYS_TRUTH = re.compile(r'ground_?truth|(^|[/_])gt([/_]|$)|mocap|vicon|optitrack', re.IGNORECASE)
_FIXED = re.compile(r'(^|_)(map|world|earth)$', re.IGNORECASE)  # roots that no odometry has


class BagTruth(NamedTuple):
    """The true trajectory of a bag, None where it has none, and what to know about it."""

    trajectory: Trajectory | None
    remarks: tuple[str, ...] = ()


def bag_truth(
    bag: BagReader, topic_name: str, camera_frame: str, stamps_ns: np.ndarray
) -> BagTruth:
    """Return the true trajectory of the camera that a bag carries.

    Looked for, unless ``topic_name`` says where, in this order: a topic of transforms or poses
    whose name says that it is the truth, then the chain of /tf and /tf_static that ends in
    ``camera_frame``. That chain counts unasked only where it begins in a frame called map, world
    or earth, or like a truth, and passes no odometry; any other one is a remark. ``name`` of the
    trajectory says what was found. Transforms are interpolated at ``stamps_ns`` [N], the images'
    stamps. A message that names the frame it moves is carried over to the camera by /tf_static; a
    plain pose is taken for the camera's own.

    Raises :class:`DataError` where the topic is of another type or does not lead to the camera.
    """
    topic = bag.topic(topic_name, TRUTH_TYPES) if topic_name else _truth_topic(bag)
    is_guess = topic is None
    topic = topic or bag.topics.get('/tf')
    if topic is None or topic.type not in TRUTH_TYPES:
        return BagTruth(None)
    if topic.type in TF_TYPES:
        edges = _tf_edges(bag, topic.name)
        if is_guess and (doubt := _doubt(edges, camera_frame)):
            return BagTruth(None, (doubt,))
        found = _tf_trajectory(edges, topic.name, camera_frame, stamps_ns)
    else:
        found = _pose_trajectory(bag, topic, camera_frame)
    if found is None and not is_guess:
        raise DataError(f'{bag.path}: {topic.name} holds no pose of the frame {camera_frame!r}')
    return BagTruth(found)


def static_transform(bag: BagReader, target: str, source: str) -> np.ndarray | None:
    """Return T_target_source [4, 4] from /tf_static, or None where no chain connects them."""
    edges = _static_edges(bag)
    poses = []
    for frame in (target, source):
        known = {_plain(frame): np.eye(4)}  # pose of the frame in each of its ancestors
        for edge in _chain(edges, frame):
            known[edge.parent] = edge.poses[0] @ list(known.values())[-1]
        poses.append(known)
    common = next((frame for frame in poses[0] if frame in poses[1]), None)
    if common is None:
        return None
    return np.linalg.inv(poses[0][common]) @ poses[1][common]


def _truth_topic(bag: BagReader) -> BagTopic | None:
    topics = [t for t in sorted(bag.topics.values()) if t.num_messages]
    named = [t for t in topics if _SAYS_TRUTH.search(t.name)]
    for kinds in (TF_TYPES, POSE_TYPES):
        for topic in named:
            if topic.type in kinds:
                return topic
    return None


def _doubt(edges: dict[str, '_Edge'], camera_frame: str) -> str:
    """Why the chain to the camera may be an odometry, not a truth; '' where it hardly is one."""
    path = _chain(edges, camera_frame)
    if all(edge.is_static for edge in path):
        return ''
    frames = [edge.parent for edge in reversed(path)]
    root = frames[0]
    is_odometry = any('odom' in frame.lower() for frame in frames)
    if not is_odometry and (_FIXED.search(root) or _SAYS_TRUTH.search(root)):
        return ''
    what = 'an odometry' if is_odometry else f'no known fixed frame ({root!r})'
    return (
        f'no true poses: /tf leads to the camera by {" -> ".join([*frames, camera_frame])}, which '
        f'is {what}; --ground-truth /tf takes it for the truth'
    )


def _pose_trajectory(bag: BagReader, topic: BagTopic, camera_frame: str) -> Trajectory | None:
    stamps, poses = [], []
    body_frame = ''
    for recorded in bag.messages([topic.name]):
        message = bag.deserialize(recorded)
        body_frame = getattr(message, 'child_frame_id', '')
        stamps.append(stamp_ns(message))
        poses.append(_matrix(POSE_TYPES[topic.type](message)))
    T_world_camera = np.array(poses)
    if body_frame and _plain(body_frame) != _plain(camera_frame):
        edges = _chain(_static_edges(bag), camera_frame, until=_plain(body_frame))
        if not edges or edges[-1].parent != _plain(body_frame):
            return None
        for edge in reversed(edges):
            T_world_camera = T_world_camera @ edge.poses[0]
    return _sorted(np.array(stamps), T_world_camera, topic.name)


def _tf_edges(bag: BagReader, topic: str) -> dict[str, '_Edge']:
    """All edges of a topic of transforms and of /tf_static, by child frame."""
    edges = _static_edges(bag)
    for transform in _transforms(bag, topic):
        edge = edges.setdefault(_plain(transform.child_frame_id), _Edge())
        edge.add(transform)
    return edges


def _tf_trajectory(
    edges: dict[str, '_Edge'], topic: str, camera_frame: str, stamps_ns: np.ndarray
) -> Trajectory | None:
    path = _chain(edges, camera_frame)
    if all(edge.is_static for edge in path):
        return None
    T_root_camera = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
    known = np.ones(len(stamps_ns), bool)
    for edge in reversed(path):
        T_parent_child, inside = edge.at(stamps_ns)
        T_root_camera = T_root_camera @ T_parent_child
        known &= inside
    if not known.any():
        return None
    name = f'{topic} {path[-1].parent} -> {camera_frame}'
    return _sorted(stamps_ns[known], T_root_camera[known], name)


class _Edge:
    """The transforms from one frame to its parent, over time."""

    def __init__(self, is_static: bool = False):
        self.is_static = is_static
        self.parent = ''
        self.stamps_ns: list[int] = []
        self.poses: list[np.ndarray] = []

    def add(self, transform: Any) -> None:
        self.parent = _plain(transform.header.frame_id)
        self.stamps_ns.append(stamp_ns(transform))
        self.poses.append(_matrix(transform.transform))

    def at(self, stamps_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Poses [N, 4, 4] at stamps [N], and which of these lie between two transforms [N]."""
        if self.is_static:
            return np.array(self.poses[-1]), np.ones(len(stamps_ns), bool)
        times, first = np.unique(self.stamps_ns, return_index=True)
        poses = np.array(self.poses)[first]
        inside = (stamps_ns >= times[0]) & (stamps_ns <= times[-1])
        if len(times) == 1:
            return poses[0], inside
        seconds = (times - times[0]) * 1e-9  # relative: float64 would round absolute stamps
        query = (np.clip(stamps_ns, times[0], times[-1]) - times[0]) * 1e-9
        between = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
        between[:, :3, :3] = Slerp(seconds, Rotation.from_matrix(poses[:, :3, :3]))(
            query
        ).as_matrix()
        for axis in range(3):
            between[:, axis, 3] = np.interp(query, seconds, poses[:, axis, 3])
        return between, inside


def _chain(edges: dict[str, _Edge], frame: str, until: str = '') -> list[_Edge]:
    """Return the edges from a frame up to ``until`` or the root, lowest first."""
    path, frame = [], _plain(frame)
    while frame in edges and frame != until and len(path) <= len(edges):
        path.append(edges[frame])
        frame = edges[frame].parent
    return path


def _static_edges(bag: BagReader) -> dict[str, _Edge]:
    edges: dict[str, _Edge] = {}
    for transform in _transforms(bag, STATIC_TF_TOPIC):
        edges.setdefault(_plain(transform.child_frame_id), _Edge(is_static=True)).add(transform)
    return edges


def _transforms(bag: BagReader, topic: str) -> Iterator[Any]:
    if topic not in bag.topics:
        return iter(())
    messages = (bag.deserialize(message) for message in bag.messages([topic]))
    return chain.from_iterable(message.transforms for message in messages)


def _matrix(pose: Any) -> np.ndarray:
    try:
        return pose_from_message(pose)
    except InputError as error:
        raise DataError(f'the true trajectory: {error}') from error


def _plain(frame: str) -> str:
    return frame.lstrip('/')  # ROS 1 wrote it in front


def _sorted(stamps_ns: np.ndarray, T_world_camera: np.ndarray, name: str) -> Trajectory:
    stamps_ns, first = np.unique(stamps_ns, return_index=True)
    return Trajectory(stamps_ns, T_world_camera[first], name)
