"""Camera images from bags, videos and image files, through one protocol."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from stream3r_core.errors import DataError, InputError
from stream3r_core.evaluation.datasets.files import stamp_in_name
from stream3r_core.image import PHOTO_SUFFIXES, list_photos, load_photo
from stream3r_ros.bag import BagMessage, BagReader, is_bag
from stream3r_ros.calibration import Calibrator
from stream3r_ros.conversions import PINHOLE, Lens, image_from_message, stamp_ns

FILES_FRAME = 'camera_optical_frame'  # of inputs that name no frame
DEFAULT_RATE_HZ = 30.0
FIRST_STAMP_NS = 10**9  # of frames without stamps; in ROS a stamp of 0 means that there is none
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
_log = logging.getLogger(__name__)


class Frame(NamedTuple):
    """One camera image: rgb uint8 [H, W, 3 or 4], its stamp, its frame, K [3, 3] if known."""

    rgb: np.ndarray
    stamp_ns: int
    frame_id: str
    K: np.ndarray | None = None
    lens: Lens = PINHOLE


class Source(Protocol):
    """A finite sequence of camera images.

    Iterating gives functions that load one frame each and raise :class:`InputError` for one that
    is broken, so that the next one can still be taken. Iterating again starts anew.
    """

    name: str
    num_frames: int

    def __iter__(self) -> Iterator[Callable[[], Frame]]: ...


class EveryKth:
    """Every k-th image of another source, the first one included."""

    def __init__(self, source: Source, k: int):
        self._source, self._k = source, k
        self.name = source.name
        self.num_frames = -(-source.num_frames // k)

    def __iter__(self) -> Iterator[Callable[[], Frame]]:
        return itertools.islice(self._source, 0, None, self._k)


class BagSource:
    """The images of one topic of an open bag, in the order of their recording.

    ``camera_info_topic`` gives all images the intrinsics of its first message; 'auto' takes the
    one beside the image topic. With them, ``rectify`` 'auto' removes the distortion.
    """

    def __init__(
        self,
        bag: BagReader,
        image_topic: str = '',
        camera_info_topic: str = '',
        rectify: str = 'auto',
    ):
        self._bag = bag
        self.topic, _, self.num_frames = bag.image_topic(image_topic)
        self.name = f'{bag.path} {self.topic}'
        self._calibrate, self._info = Calibrator(rectify), None
        if camera_info_topic:
            self._info = _first_camera_info(bag, camera_info_topic, self.topic)

    def __iter__(self) -> Iterator[Callable[[], Frame]]:
        for message in self._bag.messages([self.topic]):
            yield lambda message=message: self._load(message)

    def _load(self, recorded: BagMessage) -> Frame:
        message = self._bag.deserialize(recorded)
        rgb = image_from_message(message)
        frame_id = message.header.frame_id
        frame_id = frame_id.lstrip('/') if self._bag.is_ros1 else frame_id
        if self._info is None:
            return Frame(rgb, stamp_ns(message), frame_id)
        rgb, K, lens = self._calibrate(rgb, self._info)
        return Frame(rgb, stamp_ns(message), frame_id, K, lens)


class ImageFiles:
    """Image files in their order.

    File names that are seconds with decimals (TUM) or nanoseconds (EuRoC) are the stamps;
    otherwise frame n is stamped 1 s + n / ``rate_hz``.
    """

    def __init__(self, paths: Sequence[Path], rate_hz: float = DEFAULT_RATE_HZ):
        self.paths = list(paths)
        self.num_frames = len(self.paths)
        self.name = str(self.paths[0].parent)
        stamps = [stamp_in_name(path) for path in self.paths]
        if None in stamps:
            stamps = [_made_up_stamp(index, rate_hz) for index in range(self.num_frames)]
        self._stamps_ns = stamps

    def __iter__(self) -> Iterator[Callable[[], Frame]]:
        for path, stamp in zip(self.paths, self._stamps_ns):
            yield lambda path=path, stamp=stamp: self._load(path, stamp)

    @staticmethod
    def _load(path: Path, stamp: int) -> Frame:
        try:
            return Frame(load_photo(path), stamp, FILES_FRAME)
        except DataError as error:  # one broken file is like one broken message
            raise InputError(str(error)) from error


class VideoFile:
    """The frames of a video; frame n is stamped 1 s + n / frame rate."""

    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path
        video = self._open()
        self._rate_hz = video.get(cv2.CAP_PROP_FPS)
        self.num_frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        if self._rate_hz <= 0 or self.num_frames <= 0:
            raise DataError(f'{path}: the video states no frame rate or holds no frame')

    def __iter__(self) -> Iterator[Callable[[], Frame]]:
        video = self._open()
        index = 0
        while (decoded := video.read())[0]:
            rgb = cv2.cvtColor(decoded[1], cv2.COLOR_BGR2RGB)
            frame = Frame(rgb, _made_up_stamp(index, self._rate_hz), FILES_FRAME)
            yield lambda frame=frame: frame
            index += 1
        if index < self.num_frames:  # no error: some containers state an estimate
            _log.warning('%s states %d frames, %d were decoded', self.name, self.num_frames, index)

    def _open(self) -> cv2.VideoCapture:
        video = cv2.VideoCapture(str(self._path))
        if not video.isOpened():
            raise DataError(
                f'{self._path} is no bag, no image and cannot be opened as a video; images are '
                f'*{", *".join(PHOTO_SUFFIXES)}'
            )
        return video


def file_source(inputs: Sequence[str], rate_hz: float = DEFAULT_RATE_HZ) -> Source:
    """Return the source of a folder of images, of image files or of a video.

    Raises :class:`DataError` where the inputs are none of these.
    """
    paths = [Path(text) for text in inputs]
    for path in paths:
        if not path.exists():
            raise DataError(f'{path}: no such file or folder')
    if are_photos(inputs):
        return ImageFiles(paths, rate_hz)
    if len(paths) > 1:
        odd = next(path for path in paths if path.suffix.lower() not in PHOTO_SUFFIXES)
        raise DataError(f'several inputs must all be image files, got {odd}')
    if paths[0].is_dir():
        return ImageFiles(_photos_of(paths[0]), rate_hz)
    return VideoFile(paths[0])


def _photos_of(folder: Path) -> list[Path]:
    try:
        return list_photos(folder)
    except DataError as error:
        raise DataError(
            f'{error}, and no bag either (metadata.yaml, or one .mcap or .db3)'
        ) from error


def are_photos(inputs: Sequence[str]) -> bool:
    """Tell whether the inputs are image files, named one by one."""
    return all(Path(text).suffix.lower() in PHOTO_SUFFIXES for text in inputs)


def is_one_bag(inputs: Sequence[str]) -> bool:
    """Tell whether the input is a bag."""
    return len(inputs) == 1 and is_bag(inputs[0])


def camera_info_name(name: str, image_topic: str) -> str:
    """Return the topic that ``name`` means; 'auto' is the one beside the image topic."""
    if name != 'auto':
        return name
    return image_topic.removesuffix('/compressed').rpartition('/')[0] + '/camera_info'


def _first_camera_info(bag: BagReader, name: str, image_topic: str):
    topic = bag.topic(camera_info_name(name, image_topic), (CAMERA_INFO,))
    message = next(bag.messages([topic.name]), None)
    if message is None:
        raise DataError(f'{bag.path}: no message on {topic.name}')
    return bag.deserialize(message)


def _made_up_stamp(index: int, rate_hz: float) -> int:
    return FIRST_STAMP_NS + round(index * 1e9 / rate_hz)
