"""Bags, videos and image files as clips of an evaluation, with the truth that they carry."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from stream3r_core.errors import DataError, InputError
from stream3r_core.evaluation.config import MAX_GAP_S
from stream3r_core.evaluation.datasets.frames import Clip, Frame, pose_at, resized_K
from stream3r_core.evaluation.registration import register_depth
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_ros.bag import DEPTH_ENCODINGS, RAW_IMAGE, BagReader, BagTopic
from stream3r_ros.calibration import Calibrator, distortion
from stream3r_ros.config import NodeConfig
from stream3r_ros.conversions import (
    PINHOLE,
    Lens,
    camera_view,
    depth_from_message,
    image_from_message,
    stamp_ns,
)
from stream3r_ros.ground_truth import BagTruth, at_camera, bag_truth, read_body, static_transform
from stream3r_ros.sources import ImageFiles, Source, camera_info_name
from stream3r_ros.tf import camera_frame

DEPTH_TOLERANCE_NS = 20_000_000  # image to depth


@dataclass(frozen=True)
class _View:
    """A camera of a bag: the frame of its messages, its intrinsics and their image size."""

    frame_id: str
    K: np.ndarray | None
    size_hw: tuple[int, int] | None
    info: Any = None  # the CameraInfo that says so
    lens: Lens = PINHOLE  # the distortion that its images have when they are loaded


@dataclass(frozen=True)
class _DepthTopic:
    """A depth topic, and how its maps come into the camera of the images."""

    name: str
    register: Callable[[np.ndarray], np.ndarray]


def bag_clip(
    path: str | Path,
    image_topic: str = '',
    depth_topic: str = '',
    truth: Trajectory | str | None = '',
    config: NodeConfig | None = None,
    rectify: str = 'never',
    body: str = '',
    truth_gap_s: float = MAX_GAP_S,
) -> Clip:
    """Return the images of a bag with depth and true poses.

    ``depth_topic``: '' finds one, 'none' wants none. ``truth``: a trajectory, the name of a topic
    of the bag, '' to look for one, None for none. Depth of another camera is projected into that
    of the images where /tf_static and both camera_info topics allow it. ``rectify`` 'auto' removes
    the distortion that the camera_info of the images tells of, from them and from their depth.
    ``body`` says what the true poses are those of: a frame, or a file of T_body_camera.

    Raises:
        DataError: The bag, or a topic that was named, is not usable.

    """
    with BagReader(path) as bag:
        images = bag.image_topic(image_topic)
        stamps, view = _image_stamps(bag, images)
        calibrate, view = _rectification(view, rectify)
        depth, remarks = None, []
        if depth_topic != 'none':
            depth, remarks = _find_depth(bag, depth_topic, view, calibrate)
        T_body_camera = _body_pose(bag, body, view.frame_id) if body else None
        if isinstance(truth, str):
            frame_id = camera_frame(view.frame_id, config or NodeConfig())
            found = bag_truth(bag, truth, frame_id, stamps, T_body_camera, truth_gap_s)
        else:
            found = BagTruth(None) if truth is None else at_camera(truth, T_body_camera)
        truth = found.trajectory
        remarks += found.remarks
    if calibrate is not None:
        remarks.append(f'images are rectified as {view.info.distortion_model} lenses need it')
    frames = BagFrames(Path(path), images, len(stamps), view, truth, depth, calibrate)
    name = f'{Path(path).name} {images.name}'
    return Clip(name, frames, truth, tuple(remarks), view.frame_id)


def _body_pose(bag: BagReader, body: str, frame_id: str) -> np.ndarray:
    """T_body_camera [4, 4] of a file or of a frame of the bag."""
    if Path(body).is_file():
        return read_body(body)
    T_body_camera = static_transform(bag, body, frame_id)
    if T_body_camera is None:
        raise DataError(
            f'--ground-truth-body {body!r} is no file, and /tf_static does not connect it with '
            f'the frame of the images, {frame_id!r}'
        )
    return T_body_camera


def _rectification(view: _View, rectify: str) -> tuple[Calibrator | None, _View]:
    """What removes the distortion of a camera, and that camera without it."""
    if view.K is None or not any(distortion(view.info)):
        return None, view
    calibrate = Calibrator(rectify)
    seen = calibrate(np.zeros(view.size_hw, np.uint8), view.info)
    view = dataclasses.replace(view, K=seen.K, lens=seen.lens)
    return calibrate if seen.lens == PINHOLE else None, view


def _image_stamps(bag: BagReader, topic: BagTopic) -> tuple[np.ndarray, _View]:
    """Stamps of all images that can be read, and the camera that took them."""
    messages = (bag.deserialize(m) for m in bag.messages([topic.name]))
    stamps, frame_id = [], ''
    for message in messages:
        frame_id = frame_id or message.header.frame_id
        stamps.append(stamp_ns(message))
    if not stamps:
        raise DataError(f'{bag.path}: {topic.name} holds no image')
    return np.array(stamps), _view(bag, topic.name, frame_id)


def _view(bag: BagReader, topic: str, frame_id: str) -> _View:
    """The camera of a topic, with the intrinsics of the camera_info topic beside it."""
    name = camera_info_name('auto', topic)
    message = next(bag.messages([name]), None) if name in bag.topics else None
    if message is None:
        return _View(frame_id, None, None)
    info = bag.deserialize(message)
    try:
        return _View(frame_id, *camera_view(info), info)
    except InputError:  # an uncalibrated camera is one without intrinsics
        return _View(frame_id, None, None)


def _find_depth(
    bag: BagReader, wanted: str, images: _View, calibrate: Calibrator | None
) -> tuple[_DepthTopic | None, list[str]]:
    """The depth topic to compare with, and remarks about it; registered ones go first."""
    candidates = [_named(bag, wanted)] if wanted else _depth_topics(bag)
    found, refusals = [], []
    for topic in candidates:
        message = bag.deserialize(next(bag.messages([topic.name])))
        if message.encoding not in DEPTH_ENCODINGS:
            raise DataError(
                f'{topic.name} holds {message.encoding} images; depth is {DEPTH_ENCODINGS}'
            )
        view = _view(bag, topic.name, message.header.frame_id)
        if view.frame_id == images.frame_id:
            rectify = calibrate and partial(_rectified, calibrate=calibrate, info=images.info)
            return _DepthTopic(topic.name, rectify or _as_it_is), [f'true depth: {topic.name}']
        T_image_depth = static_transform(bag, images.frame_id, view.frame_id)
        if T_image_depth is None or images.K is None or view.K is None:
            refusals.append(
                f'{topic.name} is not compared with: its camera {view.frame_id!r} is not that of '
                f'the images, {images.frame_id!r}, and /tf_static or a camera_info is missing'
            )
            continue
        size_hw = message.height, message.width
        K_image = resized_K(images.K, images.size_hw, size_hw)
        K_depth = resized_K(view.K, view.size_hw, size_hw)
        into_image = partial(
            _registered,
            K_depth=K_depth,
            T_camera_depth=T_image_depth,
            K_camera=K_image,
            size_hw=size_hw,
        )
        found.append(_DepthTopic(topic.name, into_image))
    if wanted and not found:
        raise DataError(refusals[0])
    if not found:
        return None, refusals
    return found[0], [f'true depth: {found[0].name}, projected into the camera of the images']


def _named(bag: BagReader, name: str) -> BagTopic:
    topic = bag.topic(name, (RAW_IMAGE,))
    if not topic.num_messages:
        raise DataError(f'{bag.path}: no message on {topic.name}')
    return topic


def _depth_topics(bag: BagReader) -> list[BagTopic]:
    raw = [t for t in sorted(bag.topics.values()) if t.type == RAW_IMAGE and t.num_messages]
    return [
        topic
        for topic in raw
        if bag.deserialize(next(bag.messages([topic.name]))).encoding in DEPTH_ENCODINGS
    ]


def _as_it_is(depth_m: np.ndarray) -> np.ndarray:
    return np.nan_to_num(depth_m, nan=0.0)


def _rectified(depth_m: np.ndarray, calibrate: Calibrator, info: Any) -> np.ndarray:
    return calibrate(_as_it_is(depth_m), info, cv2.INTER_NEAREST).image


def _registered(depth_m: np.ndarray, **cameras: Any) -> np.ndarray:
    return register_depth(depth_m, **cameras)


class BagFrames:
    """Frames of a bag in the order of recording; iterating reads the bag anew.

    The bag is read by two readers side by side, so that no more than a few depth maps wait in
    memory whatever the order of recording.
    """

    def __init__(
        self,
        path: Path,
        images: BagTopic,
        count: int,
        view: _View,
        truth: Trajectory | None,
        depth: _DepthTopic | None,
        calibrate: Calibrator | None = None,
    ):
        self._path, self._images, self._count = path, images, count
        self._view, self._truth, self._depth = view, truth, depth
        self._calibrate = calibrate
        self.lens = view.lens  # the distortion of the images

    def __len__(self):
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        with BagReader(self._path) as bag, BagReader(self._path) as beside:
            depths = _Nearest(beside, self._depth.name) if self._depth else None
            for recorded in bag.messages([self._images.name]):
                message = bag.deserialize(recorded)
                stamp = stamp_ns(message)
                depth = depths.at(stamp) if depths else None
                yield Frame(
                    f'{stamp} ns',
                    stamp,
                    load_image=partial(self._load_image, message),
                    K=self._view.K,
                    T_world_camera=pose_at(self._truth, stamp),
                    load_depth_m=depth and partial(self._load_depth, depth),
                )

    def _load_image(self, message: Any) -> np.ndarray:
        image = image_from_message(message)
        if self._calibrate is None:
            return image
        return self._calibrate(image, self._view.info).image

    def _load_depth(self, message: Any) -> np.ndarray:
        try:
            return self._depth.register(depth_from_message(message))
        except InputError as error:
            raise DataError(f'{self._depth.name}: {error}') from error


class _Nearest:
    """The message of a topic nearest to stamps that are asked for in rising order."""

    def __init__(self, bag: BagReader, topic: str):
        self._messages = (bag.deserialize(m) for m in bag.messages([topic]))
        self._known: list[tuple[int, Any]] = []  # around the stamp asked for last

    def at(self, stamp: int) -> Any | None:
        while not self._known or self._known[-1][0] < stamp:
            message = next(self._messages, None)
            if message is None:
                break
            self._known.append((stamp_ns(message), message))
        self._known = self._known[-2:]
        near = min(self._known, key=lambda known: abs(known[0] - stamp), default=None)
        if near is None or abs(near[0] - stamp) > DEPTH_TOLERANCE_NS:
            return None
        return near[1]


class SourceFrames:
    """Frames of a video or of image files; iterating reads them anew."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self):
        return self._source.num_frames

    def __iter__(self) -> Iterator[Frame]:
        paths = self._source.paths if isinstance(self._source, ImageFiles) else repeat(None)
        for index, (load, path) in enumerate(zip(self._source, paths)):
            name = path.name if path else f'image {index}'
            try:
                loaded = load()
            except InputError as error:
                yield Frame(name, -1, partial(_refuse, str(error)))
                continue
            yield Frame(name, loaded.stamp_ns, partial(_rgb, loaded.rgb), path, loaded.K)


def _rgb(image: np.ndarray) -> np.ndarray:
    return image[..., :3]


def _refuse(reason: str) -> np.ndarray:
    raise InputError(reason)
