"""The true trajectory that a bag carries: for evaluation only, never an input of a network."""

import re
from collections.abc import Iterator
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from stream3r_core.errors import DataError, InputError
from stream3r_core.evaluation.config import MAX_GAP_S
from stream3r_core.evaluation.datasets.files import read_matrices
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
    bag: BagReader,
    topic_name: str,
    camera_frame: str,
    stamps_ns: np.ndarray,
    T_body_camera: np.ndarray | None = None,
    max_gap_s: float = MAX_GAP_S,
) -> BagTruth:
    """Return the true trajectory of the camera that a bag carries.

    Looked for, unless ``topic_name`` says where, in this order: a topic of transforms or poses
    whose name says that it is the truth, then the chain of /tf and /tf_static that ends in
    ``camera_frame``. That chain counts unasked only where it begins in a frame called map, world
    or earth, or like a truth, and passes no odometry; any other one is a remark. ``name`` of the
    trajectory says what was found. Transforms are interpolated at ``stamps_ns`` [N], the images'
    stamps, between two that lie at most ``max_gap_s`` apart. A message that names the frame it
    moves is carried over to the camera by /tf_static; a plain pose is taken for the camera's own.
    ``T_body_camera`` [4, 4] says of both what they are the poses of.

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
        if T_body_camera is not None:
            raise DataError(
                f'{topic.name} leads to the camera itself: leave --ground-truth-body out'
            )
        found = _tf_trajectory(edges, topic.name, camera_frame, stamps_ns, round(max_gap_s * 1e9))
    else:
        found = _pose_trajectory(bag, topic, camera_frame, T_body_camera)
    if found.trajectory is None and not is_guess:
        why = found.remarks or [f'{topic.name} holds no pose of the frame {camera_frame!r}']
        raise DataError(f'{bag.path}: {why[0]}')
    return found


def at_camera(truth: Trajectory, T_body_camera: np.ndarray | None) -> BagTruth:
    """Return the true poses of a body as those of the camera, and what was taken for granted."""
    if T_body_camera is None:
        remark = f"{truth.name}: poses are taken for the camera's own; if not: --ground-truth-body"
        return BagTruth(truth, (remark,))
    moved = Trajectory(truth.stamps_ns, truth.T_world_camera @ T_body_camera, truth.name)
    return BagTruth(moved, (f'{truth.name}: poses of a body, moved to the camera',))


def read_body(path: str | Path) -> np.ndarray:
    """Read T_body_camera [4, 4] from a text file of 16 numbers, row by row."""
    matrices = read_matrices(Path(path))
    if len(matrices) != 1:
        raise DataError(f'{path}: expected one 4x4 matrix, got {len(matrices)}')
    return Trajectory(None, matrices, str(path)).T_world_camera[0]  # which has to be rigid


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


def _pose_trajectory(
    bag: BagReader, topic: BagTopic, camera_frame: str, T_body_camera: np.ndarray | None
) -> BagTruth:
    stamps, poses = [], []
    body_frame = ''
    for recorded in bag.messages([topic.name]):
        message = bag.deserialize(recorded)
        body_frame = getattr(message, 'child_frame_id', '')
        stamps.append(stamp_ns(message))
        poses.append(_matrix(POSE_TYPES[topic.type](message)))
    truth = _sorted(np.array(stamps), np.array(poses), topic.name)
    if T_body_camera is None and body_frame:
        T_body_camera = _mount(bag, _plain(body_frame), camera_frame)
        if T_body_camera is None:
            return BagTruth(None)
    return at_camera(truth, T_body_camera)


def _mount(bag: BagReader, body_frame: str, camera_frame: str) -> np.ndarray | None:
    """T_body_camera [4, 4] where the camera hangs below the body by /tf_static."""
    if body_frame == _plain(camera_frame):
        return np.eye(4)
    edges = _chain(_static_edges(bag), camera_frame, until=body_frame)
    if not edges or edges[-1].parent != body_frame:
        return None
    return reduce(np.matmul, (edge.poses[0] for edge in reversed(edges)))


def _tf_edges(bag: BagReader, topic: str) -> dict[str, '_Edge']:
    """All edges of a topic of transforms and of /tf_static, by child frame."""
    edges = _static_edges(bag)
    for transform in _transforms(bag, topic):
        edge = edges.setdefault(_plain(transform.child_frame_id), _Edge())
        edge.add(transform)
    return edges


def _tf_trajectory(
    edges: dict[str, '_Edge'],
    topic: str,
    camera_frame: str,
    stamps_ns: np.ndarray,
    max_gap_ns: int,
) -> BagTruth:
    path = _chain(edges, camera_frame)
    if all(edge.is_static for edge in path):
        return BagTruth(None)
    T_root_camera = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
    gaps_ns = np.zeros(len(stamps_ns))
    for edge in reversed(path):
        T_parent_child, around_ns = edge.at(stamps_ns)
        T_root_camera = T_root_camera @ T_parent_child
        gaps_ns = np.maximum(gaps_ns, around_ns)
    known, dropped = gaps_ns <= max_gap_ns, np.isfinite(gaps_ns) & (gaps_ns > max_gap_ns)
    remarks = ()
    if dropped.any():
        remarks = (
            f'{dropped.sum()} images have no true pose: the transforms around them on {topic} lie '
            f'more than {max_gap_ns / 1e9:g} s apart (evaluation.truth_gap_s)',
        )
    if not known.any():
        return BagTruth(None, remarks)
    name = f'{topic} {path[-1].parent} -> {camera_frame}'
    return BagTruth(_sorted(stamps_ns[known], T_root_camera[known], name), remarks)


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
        """Poses [N, 4, 4] at stamps [N], and how far apart the transforms around them lie [N], ns.

        That is 0 on a transform and infinite before the first and after the last one.
        """
        if self.is_static:
            return np.array(self.poses[-1]), np.zeros(len(stamps_ns))
        times, first = np.unique(self.stamps_ns, return_index=True)
        poses = np.array(self.poses)[first]
        after = np.searchsorted(times, stamps_ns).clip(1, max(len(times) - 1, 1))
        after = np.minimum(after, len(times) - 1)
        gaps_ns = np.where(np.isin(stamps_ns, times), 0.0, times[after] - times[after - 1])
        gaps_ns[(stamps_ns < times[0]) | (stamps_ns > times[-1])] = np.inf
        if len(times) == 1:
            return poses[0], gaps_ns
        seconds = (times - times[0]) * 1e-9  # relative: float64 would round absolute stamps
        query = (np.clip(stamps_ns, times[0], times[-1]) - times[0]) * 1e-9
        between = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
        between[:, :3, :3] = Slerp(seconds, Rotation.from_matrix(poses[:, :3, :3]))(
            query
        ).as_matrix()
        for axis in range(3):
            between[:, axis, 3] = np.interp(query, seconds, poses[:, axis, 3])
        return between, gaps_ns


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
