"""Trajectory files: exact stamps, round trips, refusals that name the line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from stream3r_core.errors import DataError, OutputError
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import (
    TumWriter,
    format_stamp,
    parse_stamp_ns,
    read_trajectory,
    write_kitti,
    write_tum,
)

STAMPS = np.array([1_700_000_000_133_333_333, 1_700_000_000_266_666_667])


def trajectory(stamps=STAMPS):
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    rotvecs = np.random.default_rng(0).normal(size=(len(stamps), 3))
    poses[:, :3, :3] = Rotation.from_rotvec(rotvecs).as_matrix()
    poses[:, :3, 3] = rotvecs / 3
    return Trajectory(stamps, poses)


@given(st.integers(0, 2**63 - 1))
def test_every_stamp_survives_seconds_with_nine_decimals(stamp_ns):
    assert parse_stamp_ns(format_stamp(stamp_ns)) == stamp_ns


def test_exponents_and_short_fractions_are_exact():
    assert parse_stamp_ns('1.700000000133333333e+09') == 1_700_000_000_133_333_333
    assert parse_stamp_ns('1305031910.7651') == 1_305_031_910_765_100_000


def test_tum_round_trip_is_exact(tmp_path):
    write_tum(tmp_path / 'run.txt', trajectory())
    back = read_trajectory(tmp_path / 'run.txt')
    assert back.stamps_ns.tolist() == STAMPS.tolist()
    assert back.positions_m.tolist() == trajectory().positions_m.tolist()
    np.testing.assert_allclose(back.T_world_camera, trajectory().T_world_camera, atol=1e-15)


def test_kitti_round_trip_is_exact(tmp_path):
    write_kitti(tmp_path / '00.txt', trajectory())
    back = read_trajectory(tmp_path / '00.txt', stamps_ns=STAMPS)
    assert back.T_world_camera.tolist() == trajectory().T_world_camera.tolist()
    assert back.stamps_ns.tolist() == STAMPS.tolist()
    assert read_trajectory(tmp_path / '00.txt').stamps_ns is None


def test_euroc_ground_truth_is_told_by_its_commas_and_read_w_first(tmp_path):
    expected = trajectory()
    x, y, z, w = expected.quat_xyzw[0]
    px, py, pz = expected.positions_m[0]
    (tmp_path / 'data.csv').write_text(
        '#timestamp, p_RS_R_x [m], p_RS_R_y [m], p_RS_R_z [m], q_RS_w [], q_RS_x [], q_RS_y []\n'
        f'{STAMPS[0]},{px},{py},{pz},{w},{x},{y},{z},0,0,0,0,0,0,0,0,0\n'
    )
    back = read_trajectory(tmp_path / 'data.csv')
    assert back.stamps_ns.tolist() == [STAMPS[0]]
    np.testing.assert_allclose(back.T_world_camera, expected.T_world_camera[:1], atol=1e-12)


def test_a_killed_writer_leaves_whole_readable_lines(tmp_path):
    code = (
        'import os, numpy as np\n'
        'from stream3r_core.evaluation.trajectory_files import TumWriter\n'
        f'w = TumWriter({str(tmp_path / "live.txt")!r})\n'
        f'for s in {STAMPS.tolist()}: w.write(s, np.eye(4))\n'
        'os._exit(1)'
    )
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).resolve().parents[2])
    assert read_trajectory(tmp_path / 'live.txt').stamps_ns.tolist() == STAMPS.tolist()


def test_written_one_by_one_equals_written_at_once(tmp_path):
    with TumWriter(tmp_path / 'one.txt') as writer:
        for stamp, pose in zip(trajectory().stamps_ns, trajectory().T_world_camera):
            writer.write(stamp, pose)
    write_tum(tmp_path / 'all.txt', trajectory())
    one, all_ = ((tmp_path / name).read_text() for name in ('one.txt', 'all.txt'))
    assert [line for line in one.splitlines() if line[0] != '#'] == all_.splitlines()


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'no pose'),
        ('# only a comment\n', 'no pose'),
        ('1.0 2 3\n', 'line 1: 3 columns'),
        ('1.0 0 0 0 0 0 0 1\n2.0 0 0 0\n', 'line 2'),
        ('1.0 0 0 0 0 0 0 one\n', 'line 1'),
        ('# c\n1.0 0 0 0 1 1 0 1\n', 'line 2: the quaternion has norm'),
        ('1700000000133333333 0 0 0 0 0 0 1\n', 'nanoseconds'),
        ('1.0 0 0 0 0 0 0 1\nnan 0 0 0 0 0 0 1\n', 'line 2'),
        ('1.0 nan 0 0 0 0 0 1\n', 'not finite'),
        ('1 0 0 0 0 1 0 0 0 0 x 0\n', 'line 1: expected kitti'),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / 'bad.txt').write_text(text)
    with pytest.raises(DataError, match=message):
        read_trajectory(tmp_path / 'bad.txt')


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(DataError, match='cannot read'):
        read_trajectory(tmp_path / 'none.txt')
    (tmp_path / 'image.txt').write_bytes(b'\xff\xd8\xff\xe0')
    with pytest.raises(DataError, match='cannot read'):
        read_trajectory(tmp_path / 'image.txt')


def test_an_unknown_format_name_is_refused(tmp_path):
    write_tum(tmp_path / 'run.txt', trajectory())
    with pytest.raises(DataError, match='tum, kitti, euroc'):
        read_trajectory(tmp_path / 'run.txt', 'bundler')


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match='stamps'):
        write_tum(tmp_path / 'a.txt', Trajectory(None, np.eye(4)[None]))
    with pytest.raises(OutputError, match='negative'):
        write_tum(tmp_path / 'a.txt', trajectory(np.array([-5])))
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='cannot write'):
        TumWriter(tmp_path / 'file' / 'a.txt')
    assert not (tmp_path / 'a.txt').exists()
