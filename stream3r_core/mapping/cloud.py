"""A snapshot of the map, and its files: PLY and PCD, binary little endian."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stream3r_core.errors import DataError
from stream3r_core.files import atomic_write

_PLY_RECORD = np.dtype(
    [(name, '<f4') for name in 'xyz']
    + [(name, 'u1') for name in ('red', 'green', 'blue')]
    + [('confidence', '<f4')]
)
_PCD_RECORD = np.dtype([(name, '<f4') for name in ('x', 'y', 'z', 'rgb', 'confidence')])
_PLY_TYPES = {
    **dict.fromkeys(('char', 'int8'), 'i1'),
    **dict.fromkeys(('uchar', 'uint8'), 'u1'),
    **dict.fromkeys(('short', 'int16'), '<i2'),
    **dict.fromkeys(('ushort', 'uint16'), '<u2'),
    **dict.fromkeys(('int', 'int32'), '<i4'),
    **dict.fromkeys(('uint', 'uint32'), '<u4'),
    **dict.fromkeys(('float', 'float32'), '<f4'),
    **dict.fromkeys(('double', 'float64'), '<f8'),
}
_PLY_NAMES = {np.dtype(code): name for name, code in _PLY_TYPES.items() if name[-1].isalpha()}
_MAX_HEADER = 1 << 16  # bytes
BLOCK_POINTS = 1 << 14  # of a large cloud in work: what a step makes of them stays in the cache


@dataclass(frozen=True)
class MapCloud:
    """Points of a map; arrays of equal length N."""

    points_xyz: np.ndarray  # [N, 3] float32, world frame, scene units
    colors_rgb: np.ndarray  # [N, 3] uint8
    confidence: np.ndarray  # [N] float32, >= 1, mean over the observations

    def __len__(self) -> int:
        return len(self.points_xyz)

    def blocks(self) -> Iterator['MapCloud']:
        """Yield the points in order, at most :data:`BLOCK_POINTS` at a time, without a copy."""
        for start in range(0, len(self), BLOCK_POINTS):
            rows = slice(start, start + BLOCK_POINTS)
            yield MapCloud(self.points_xyz[rows], self.colors_rgb[rows], self.confidence[rows])


def save_ply(cloud: MapCloud, path: str | Path) -> None:
    """Write vertices x, y, z, red, green, blue, confidence; atomic, OutputError if it cannot."""
    records = np.empty(len(cloud), _PLY_RECORD)
    for axis, name in enumerate('xyz'):
        records[name] = cloud.points_xyz[:, axis]
    for channel, name in enumerate(('red', 'green', 'blue')):
        records[name] = cloud.colors_rgb[:, channel]
    records['confidence'] = cloud.confidence
    properties = [f'property {_PLY_NAMES[_PLY_RECORD[n]]} {n}' for n in _PLY_RECORD.names]
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(cloud)}']
    with atomic_write(path) as file:
        file.write('\n'.join([*header, *properties, 'end_header\n']).encode())
        file.write(records.data)


def save_pcd(cloud: MapCloud, path: str | Path) -> None:
    """Write fields x, y, z, rgb (packed as PCL does), confidence; atomic like `save_ply`."""
    records = np.empty(len(cloud), _PCD_RECORD)
    for axis, name in enumerate('xyz'):
        records[name] = cloud.points_xyz[:, axis]
    records['rgb'] = pack_rgb(cloud.colors_rgb)
    records['confidence'] = cloud.confidence
    count = len(_PCD_RECORD.names)
    header = [
        '# .PCD v0.7 - Point Cloud Data file format',
        'VERSION 0.7',
        f'FIELDS {" ".join(_PCD_RECORD.names)}',
        f'SIZE{" 4" * count}',
        f'TYPE{" F" * count}',
        f'COUNT{" 1" * count}',
        f'WIDTH {len(cloud)}',
        'HEIGHT 1',
        'VIEWPOINT 0 0 0 1 0 0 0',
        f'POINTS {len(cloud)}',
        'DATA binary\n',
    ]
    with atomic_write(path) as file:
        file.write('\n'.join(header).encode())
        file.write(records.data)


def pack_rgb(colors_rgb: np.ndarray) -> np.ndarray:
    """Colours [N, 3] uint8 as the bits 0x00RRGGBB of a float32 [N], as in PCL and PointCloud2."""
    packed = np.zeros((len(colors_rgb), 4), np.uint8)
    packed[:, 2::-1] = colors_rgb
    return packed.view('<f4')[:, 0]


def load_ply(path: str | Path) -> MapCloud:
    """Read the vertices of a binary little-endian PLY file.

    Absent colours become 0, an absent confidence 1.

    Raises:
        DataError: The file is missing, cut short, or not such a file.

    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f'cannot read {path}: {error.strerror or error}') from error
    record, count, start = _parse_ply_header(content, path)
    needed = start + count * record.itemsize
    if len(content) < needed:
        raise DataError(f'{path} is cut short: {len(content)} bytes instead of {needed}')
    vertices = np.frombuffer(content, record, count, start)
    colors, confidence = np.zeros((count, 3), np.uint8), np.ones(count, np.float32)
    if {'red', 'green', 'blue'} <= set(record.names):
        colors = np.stack([vertices[name] for name in ('red', 'green', 'blue')], 1)
    if 'confidence' in record.names:
        confidence = vertices['confidence'].astype(np.float32)
    points = np.stack([vertices[name] for name in 'xyz'], 1).astype(np.float32)
    return MapCloud(points, colors.astype(np.uint8), confidence)


def _parse_ply_header(content: bytes, path: str | Path) -> tuple[np.dtype, int, int]:
    """Return record type, number and first byte of the vertices."""
    head, found, _ = content[:_MAX_HEADER].partition(b'end_header\n')
    lines = [line.split() for line in head.decode('ascii', 'replace').splitlines()]
    if not found or lines[0] != ['ply']:
        raise DataError(f'{path} is not a PLY file')
    if ['format', 'binary_little_endian', '1.0'] not in lines:
        raise DataError(f'{path}: only binary little-endian PLY is read; convert it first')
    lines = [line for line in lines[1:] if line and line[0] in ('element', 'property')]
    is_vertex = bool(lines) and lines[0][:2] == ['element', 'vertex'] and len(lines[0]) == 3
    if not is_vertex or not lines[0][2].isdecimal():
        raise DataError(f'{path}: the first element of the PLY file must be vertex')
    fields = []
    for line in lines[1:]:
        if line[0] == 'element':
            break
        if len(line) != 3 or line[1] not in _PLY_TYPES:
            raise DataError(f'{path}: vertex property {" ".join(line[1:])!r} is not a number')
        fields.append((line[2], _PLY_TYPES[line[1]]))
    if not {'x', 'y', 'z'} <= {name for name, _ in fields}:
        raise DataError(f'{path}: vertices have no x, y, z')
    return np.dtype(fields), int(lines[0][2]), len(head) + len(found)
