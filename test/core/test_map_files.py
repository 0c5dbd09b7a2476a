import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stream3r_core.errors import DataError, OutputError
from stream3r_core.files import atomic_write
from stream3r_core.mapping import MapCloud, load_ply, save_pcd, save_ply

ROOT = Path(__file__).resolve().parents[2]


def cloud_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return MapCloud(
        rng.normal(size=(count, 3)).astype(np.float32),
        rng.integers(0, 256, (count, 3), np.uint8),
        rng.uniform(1, 9, count).astype(np.float32),
    )


@pytest.mark.parametrize('count', [0, 1, 1000])
def test_a_ply_file_holds_the_cloud_exactly(tmp_path, count):
    cloud = cloud_of(count)
    save_ply(cloud, tmp_path / 'map.ply')
    back = load_ply(tmp_path / 'map.ply')
    for field in ('points_xyz', 'colors_rgb', 'confidence'):
        stored, loaded = getattr(cloud, field), getattr(back, field)
        assert loaded.dtype == stored.dtype and np.array_equal(loaded, stored)
    assert os.listdir(tmp_path) == ['map.ply']


@pytest.mark.parametrize('count', [0, 1, 1000])
def test_a_pcd_file_holds_the_cloud_exactly(tmp_path, count):
    cloud = cloud_of(count)
    save_pcd(cloud, tmp_path / 'map.pcd')
    header, _, body = (tmp_path / 'map.pcd').read_bytes().partition(b'DATA binary\n')
    entries = dict(line.split(' ', 1) for line in header.decode().splitlines()[1:])
    assert entries['FIELDS'] == 'x y z rgb confidence' and entries['TYPE'] == 'F F F F F'
    assert int(entries['POINTS']) == int(entries['WIDTH']) == count
    assert len(body) == 20 * count
    rows = np.frombuffer(body, '<f4').reshape(count, 5)
    assert np.array_equal(rows[:, :3], cloud.points_xyz)
    assert np.array_equal(rows[:, 4], cloud.confidence)
    packed = np.frombuffer(body, '<u4').reshape(count, 5)[:, 3]
    unpacked = np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], 1)
    assert np.array_equal(unpacked, cloud.colors_rgb) and (packed >> 24 == 0).all()


def test_ply_files_of_others_are_read_by_the_names_of_their_properties(tmp_path):
    record = np.dtype([('nx', '<f4'), ('x', '<f8'), ('y', '<f8'), ('z', '<f8'), ('quality', 'u1')])
    vertices = np.zeros(3, record)
    vertices['y'] = [1, 2, 3]
    header = (
        'ply\nformat binary_little_endian 1.0\ncomment made elsewhere\nelement vertex 3\n'
        'property float nx\nproperty double x\nproperty double y\nproperty double z\n'
        'property uchar quality\nelement face 0\nproperty list uchar int vertex_indices\n'
        'end_header\n'
    )
    (tmp_path / 'other.ply').write_bytes(header.encode() + vertices.tobytes())
    cloud = load_ply(tmp_path / 'other.ply')
    assert np.array_equal(cloud.points_xyz, [[0, 1, 0], [0, 2, 0], [0, 3, 0]])
    assert (cloud.colors_rgb == 0).all() and (cloud.confidence == 1).all()


PLY = b'ply\nformat binary_little_endian 1.0\n'


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'', 'not a PLY'),
        (b'\x00\xff' * 100, 'not a PLY'),
        (b'ply\nformat ascii 1.0\nelement vertex 0\nend_header\n', 'binary little-endian'),
        (PLY + b'element face 1\nend_header\n', 'first element'),
        (PLY + b'element vertex 1\nproperty float x\nend_header\n', 'no x, y, z'),
        (PLY + b'element vertex 1\nproperty list uchar int x\nend_header\n', 'not a number'),
        (PLY + b'element vertex many\nproperty float x\nend_header\n', 'first element'),
    ],
)
def test_files_that_are_no_such_cloud_are_refused(tmp_path, content, reason):
    (tmp_path / 'map.ply').write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_ply(tmp_path / 'map.ply')


def test_missing_and_truncated_files_are_refused(tmp_path):
    with pytest.raises(DataError, match='absent'):
        load_ply(tmp_path / 'absent.ply')
    save_ply(cloud_of(10), tmp_path / 'map.ply')
    whole = (tmp_path / 'map.ply').read_bytes()
    (tmp_path / 'map.ply').write_bytes(whole[:-1])
    with pytest.raises(DataError, match='cut short'):
        load_ply(tmp_path / 'map.ply')


@pytest.mark.parametrize('save', [save_ply, save_pcd])
def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, save):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'absent' / 'map', tmp_path / 'file' / 'map', tmp_path):
        with pytest.raises(OutputError, match='cannot write'):
            save(cloud_of(10), path)
    assert os.listdir(tmp_path) == ['file']


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path):
    """The kernel's limit on file size stands for the full disk: writing stops half way."""
    save_ply(cloud_of(10), tmp_path / 'map.ply')
    whole = (tmp_path / 'map.ply').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r'map\.ply'):
            save_ply(cloud_of(10_000), tmp_path / 'map.ply')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'map.ply').read_bytes() == whole
    assert os.listdir(tmp_path) == ['map.ply']


def test_a_process_killed_while_saving_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / 'map.ply'
    path.write_bytes(b'previous')
    code = (
        'import os, signal, sys\n'
        'from stream3r_core.files import atomic_write\n'
        'with atomic_write(sys.argv[1]) as file:\n'
        '    file.write(b"half of the new")\n'
        '    file.flush()\n'
        '    os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    run = subprocess.run([sys.executable, '-c', code, str(path)], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b'previous'


def test_an_error_while_writing_is_passed_on_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / 'map.ply') as file:
        file.write(b'x')
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
