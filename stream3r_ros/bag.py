"""Rosbags without ROS: reading sqlite3, mcap and ROS 1 bags, writing mcap."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_typestore

from stream3r_core.errors import DataError, InputError, OutputError
from stream3r_ros.qos import Qos

RELIABLE = Qos()
JAZZY = get_typestore(Stores.ROS2_JAZZY)
RAW_IMAGE = 'sensor_msgs/msg/Image'
COMPRESSED_IMAGE = 'sensor_msgs/msg/CompressedImage'
DEPTH_ENCODINGS = ('16UC1', '32FC1')


class BagTopic(NamedTuple):
    """A topic of a bag."""

    name: str
    type: str
    num_messages: int


class BagMessage(NamedTuple):
    """A recorded message, not yet deserialised."""

    topic: str
    type: str
    stamp_ns: int  # when it was recorded; the header has the sensor's own stamp
    raw: bytes


def is_bag(path: str | Path) -> bool:
    """Tell whether a path looks like a bag: a storage file, or a folder that holds one."""
    path = Path(path)
    if path.is_dir():
        return (path / 'metadata.yaml').exists() or bool(_storage_files(path))
    return path.suffix in ('.mcap', '.db3', '.bag')


class BagReader:
    """A rosbag2 folder, a single .mcap or .db3 file, or a ROS 1 .bag file.

    Use as a context manager. Raises :class:`DataError` where the bag cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._explained():
            self._reader = AnyReader(self._files(), default_typestore=JAZZY)

    def __enter__(self) -> 'BagReader':
        with self._explained():
            self._reader.open()
        self.topics = {
            name: BagTopic(name, info.msgtype or 'several types', info.msgcount)
            for name, info in self._reader.topics.items()
        }
        if not any(topic.num_messages for topic in self.topics.values()):
            self._reader.close()
            raise DataError(f'{self.path}: the bag holds no message; record it anew')
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    @property
    def is_ros1(self) -> bool:
        """Tell whether this is a ROS 1 bag, whose frame names may begin with a slash."""
        return self.path.suffix == '.bag'

    def topic(self, name: str, types: Collection[str] = ()) -> BagTopic:
        """Return the topic of that name, of one of ``types`` if given, or raise DataError."""
        found = self.topics.get(name) or self.topics.get('/' + name)
        if found is None:
            raise DataError(f'{self.path} has no topic {name!r}; it holds {self._listing()}')
        if types and found.type not in types:
            raise DataError(
                f'{self.path}: topic {found.name} is a {found.type}; expected {" or ".join(types)}'
            )
        return found

    def messages(self, topics: Collection[str] = ()) -> Iterator[BagMessage]:
        """Yield the messages of ``topics`` (all: empty) in the order of their recording."""
        connections = [c for c in self._reader.connections if not topics or c.topic in topics]
        with self._explained():
            if not connections:
                return
            for connection, stamp_ns, raw in self._reader.messages(connections):
                yield BagMessage(connection.topic, connection.msgtype, stamp_ns, raw)

    def deserialize(self, message: BagMessage) -> Any:
        """Return the message as a dataclass, or raise InputError when its bytes are damaged."""
        try:
            return self._reader.deserialize(message.raw, message.type)
        except Exception as error:  # the generated parsers fail in many ways on damaged bytes
            raise InputError(
                f'a {message.type} of {len(message.raw)} bytes on {message.topic} cannot be '
                f'deserialised: {error!r}'
            ) from error

    def image_topic(self, name: str = '') -> BagTopic:
        """Return the topic of camera images: the one named, or the only one that it can be.

        Without a name, colour goes before grey and a raw topic before its compressed twin; depth
        images do not count. Raises DataError with what the bag holds where that leaves no topic,
        or more than one.
        """
        if name:
            return self.topic(name, (RAW_IMAGE, COMPRESSED_IMAGE))
        ranked = [(rank, t) for t in self.topics.values() if (rank := self._rank(t)) is not None]
        if not ranked:
            raise DataError(
                f'{self.path} has no topic of camera images; it holds {self._listing()}'
            )
        best = min(rank for rank, _ in ranked)
        names = {topic.name for rank, topic in ranked if rank == best}
        chosen = [n for n in names if n.removesuffix('/compressed') not in names - {n}]
        if len(chosen) > 1:
            raise DataError(
                f'{self.path} has several topics of camera images: {", ".join(sorted(chosen))}; '
                'choose one with --image-topic'
            )
        return self.topics[chosen[0]]

    def _rank(self, topic: BagTopic) -> int | None:
        """Colour 0, grey 1, no camera image None; judged by the first message."""
        if topic.type not in (RAW_IMAGE, COMPRESSED_IMAGE) or not topic.num_messages:
            return None
        try:
            message = self.deserialize(next(self.messages([topic.name])))
        except InputError:  # damaged: it may be the camera all the same
            return 0
        kind = message.encoding if topic.type == RAW_IMAGE else message.format
        if kind in DEPTH_ENCODINGS or 'compressedDepth' in kind:
            return None
        return int(kind.startswith(('mono', '8UC1')))

    def _files(self) -> list[Path]:
        """Return what rosbags opens; a folder without metadata stands for its one storage file."""
        if not self.path.is_dir() or (self.path / 'metadata.yaml').exists():
            return [self.path]
        files = _storage_files(self.path)
        if len(files) == 1:
            return files
        raise DataError(
            f'{self.path} is no bag: expected metadata.yaml or one .mcap or .db3 file, found '
            f'{len(files)} of them; `ros2 bag reindex` writes a lost metadata.yaml'
        )

    def _listing(self) -> str:
        lines = (f'  {t.name}  {t.type}  ({t.num_messages})' for t in self.topics.values())
        return 'these topics:\n' + '\n'.join(sorted(lines))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f'{self.path}: no such bag ({error})') from error
        except Exception as error:  # readers of damaged files fail in many ways
            raise DataError(
                f'{self.path} cannot be read as a bag: {error or repr(error)}. A recording that '
                'was cut off is repaired by `mcap recover` (mcap) or `ros2 bag reindex` (sqlite3)'
            ) from error


class BagWriter:
    """Writes a new rosbag2 in mcap.

    Use as a context manager; an exception inside leaves a whole bag of what came before. Raises
    :class:`OutputError` where it cannot write.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._explained():
            self._writer = Writer(self.path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._connections: dict[str, Any] = {}

    def __enter__(self) -> 'BagWriter':
        with self._explained():
            self._writer.open()
        return self

    def __exit__(self, *_: object) -> None:
        with self._explained():
            self._writer.close()  # not the writer's own exit: that one discards after an error

    def write(self, topic: str, message: Any, stamp_ns: int, qos: Qos = RELIABLE) -> None:
        """Append a message of the rosbags library; ``qos`` counts at the topic's first message."""
        type_name = message.__msgtype__
        self.write_raw(topic, type_name, JAZZY.serialize_cdr(message, type_name), stamp_ns, qos)

    def write_raw(
        self,
        topic: str,
        type_name: str,
        raw: bytes | memoryview,
        stamp_ns: int,
        qos: Qos = RELIABLE,
    ) -> None:
        """Append a message that is serialised already (CDR)."""
        with self._explained():
            if topic not in self._connections:
                self._connections[topic] = self._writer.add_connection(
                    topic, type_name, typestore=JAZZY, offered_qos_profiles=[qos.for_rosbags()]
                )
            self._writer.write(self._connections[topic], stamp_ns, raw)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, WriterError) as error:
            raise OutputError(f'cannot write the bag {self.path}: {error}') from error


def _storage_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in ('.mcap', '.db3'))
