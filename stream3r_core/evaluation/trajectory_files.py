"""Trajectory files: TUM, KITTI and EuRoC, with exact nanosecond stamps."""

import os
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.errors import DataError, OutputError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.files import atomic_write

FORMATS = {
    'tum': '8 numbers per line: stamp_s tx ty tz qx qy qz qw',
    'kitti': '12 numbers per line: the upper 3x4 of the camera-to-world matrix, row-major',
    'euroc': 'comma-separated: stamp_ns, px, py, pz, qw, qx, qy, qz, ...',
}


def read_trajectory(
    path: str | os.PathLike, file_format: str = 'auto', stamps_ns: np.ndarray | None = None
) -> Trajectory:
    """Read a trajectory; ``file_format`` 'auto' tells TUM, KITTI and EuRoC by their columns.

    ``stamps_ns`` [N] gives a KITTI file its times. EuRoC poses are those of the file's own sensor
    (the IMU, or the tracker's prism). Raises DataError naming the line that is not as expected.
    """
    rows = _rows(path)
    if file_format == 'auto':
        file_format = _guess_format(path, *rows[0])
    if file_format not in FORMATS:
        raise DataError(f'unknown trajectory format {file_format!r}; known: {", ".join(FORMATS)}')
    if file_format == 'kitti':
        return _from_kitti(path, rows, stamps_ns)
    stamps, numbers = _stamped_numbers(path, rows, file_format)
    quat_xyzw = numbers[:, 3:7] if file_format == 'tum' else numbers[:, [4, 5, 6, 3]]
    return Trajectory(stamps, _poses(path, rows, numbers[:, :3], quat_xyzw), Path(path).name)


def parse_stamp_ns(text: str) -> int:
    """Exact nanoseconds of a decimal number of seconds; raises ValueError."""
    try:
        stamp_ns = int((Decimal(text) * 10**9).to_integral_value())
    except (InvalidOperation, OverflowError, ValueError) as error:
        raise ValueError(f'{text!r} is no number') from error
    if abs(stamp_ns) >= 2**63:
        raise ValueError(f'{text} is too large for seconds; are these nanoseconds?')
    return stamp_ns


def format_stamp(stamp_ns: int) -> str:
    """Seconds with nine decimals, exactly ``stamp_ns``."""
    if stamp_ns < 0:
        raise OutputError(f'stamps must not be negative in a TUM file, got {stamp_ns} ns')
    seconds, nanoseconds = divmod(int(stamp_ns), 10**9)
    return f'{seconds}.{nanoseconds:09d}'


class TumWriter:
    """Append poses to a TUM file as they come; every finished line is on disk at once.

    A run that is killed leaves a readable file of whole lines. Use as a context manager.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            self._file = open(path, 'w', encoding='ascii', buffering=1)
        except OSError as error:
            raise OutputError(f'cannot write the trajectory {path}: {error}') from error
        self._file.write('# timestamp_s tx ty tz qx qy qz qw (T_world_camera)\n')

    def write(self, stamp_ns: int, T_world_camera: np.ndarray) -> None:
        """Append one pose [4, 4]."""
        pose = Trajectory(None, np.asarray(T_world_camera)[None])
        numbers = [*pose.positions_m[0].tolist(), *pose.quat_xyzw[0].tolist()]
        self._file.write(f'{format_stamp(stamp_ns)} {" ".join(map(repr, numbers))}\n')

    def close(self) -> None:
        """Close the file; further writes fail."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def write_tum(path: str | os.PathLike, trajectory: Trajectory) -> None:
    """Write a whole trajectory in TUM format; numbers round-trip exactly."""
    if trajectory.stamps_ns is None:
        raise OutputError(f'{trajectory.name} has no stamps; a TUM file needs them')
    numbers = np.hstack([trajectory.positions_m, trajectory.quat_xyzw]).tolist()
    write_lines(
        path,
        (
            f'{format_stamp(stamp)} {" ".join(map(repr, row))}'
            for stamp, row in zip(trajectory.stamps_ns.tolist(), numbers)
        ),
    )


def write_kitti(path: str | os.PathLike, trajectory: Trajectory) -> None:
    """Write the upper 3x4 of each camera-to-world matrix, row-major, without stamps."""
    rows = trajectory.T_world_camera[:, :3].reshape(-1, 12).tolist()
    write_lines(path, (' '.join(map(repr, row)) for row in rows))


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Replace ``path`` by these lines in one step: readers see the old file or the whole new."""
    with atomic_write(Path(path)) as file:
        file.writelines(f'{line}\n'.encode() for line in lines)


def _rows(path: str | os.PathLike) -> list[tuple[int, list[str], bool]]:
    """Line number, columns and "has commas" of every line that is not empty or a comment."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'cannot read the trajectory {path}: {error}') from error
    rows = [
        (number, line.replace(',', ' ').split(), ',' in line)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith('#')
    ]
    if not rows:
        raise DataError(f'{path}: no pose in the file; expected one of: {_formats()}')
    return rows


def _guess_format(path: str | os.PathLike, line: int, columns: list[str], commas: bool) -> str:
    if commas and len(columns) >= 8:
        return 'euroc'
    if not commas and len(columns) in (8, 12):
        return 'tum' if len(columns) == 8 else 'kitti'
    raise DataError(
        f'{path}, line {line}: {len(columns)} columns are of no known trajectory format; '
        f'{_formats()}'
    )


def _formats() -> str:
    return '; '.join(f'{name}: {text}' for name, text in FORMATS.items())


def _stamped_numbers(path, rows, file_format) -> tuple[np.ndarray, np.ndarray]:
    """Exact stamps [N] and the seven pose numbers [N, 7]."""
    stamps, numbers = [], []
    for number, columns, _ in rows:
        try:
            if len(columns) < 8 or (file_format == 'tum' and len(columns) != 8):
                raise ValueError(f'{len(columns)} columns')
            stamps.append(parse_stamp_ns(columns[0]) if file_format == 'tum' else int(columns[0]))
            numbers.append([float(c) for c in columns[1:8]])
        except ValueError as error:
            raise DataError(
                f'{path}, line {number}: expected {file_format}, {FORMATS[file_format]}; got '
                f'{" ".join(columns)[:80]!r} ({error})'
            ) from error
    return np.array(stamps, dtype=np.int64), np.array(numbers)


def _poses(path, rows, positions, quat_xyzw) -> np.ndarray:
    norms = np.linalg.norm(quat_xyzw, axis=1)
    if not (np.abs(norms - 1) < 0.01).all():
        bad = int(np.argmax(~(np.abs(norms - 1) < 0.01)))
        raise DataError(
            f'{path}, line {rows[bad][0]}: the quaternion has norm {norms[bad]:.4g} instead of 1; '
            'check the order of the columns'
        )
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(quat_xyzw).as_matrix()
    poses[:, :3, 3] = positions
    return poses


def _from_kitti(path, rows, stamps_ns) -> Trajectory:
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    for pose, (number, columns, _) in zip(poses, rows):
        try:
            pose[:3] = np.array([float(c) for c in columns]).reshape(3, 4)
        except ValueError as error:
            raise DataError(
                f'{path}, line {number}: expected kitti, {FORMATS["kitti"]} ({error})'
            ) from error
    return Trajectory(stamps_ns, poses, Path(path).name)
