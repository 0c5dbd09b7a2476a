"""Trajectory metrics: golden values, evo's own command line, known transforms, refusals."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from stream3r_core.errors import DataError
from stream3r_core.evaluation.trajectory import (
    ALIGNMENTS,
    Trajectory,
    associate,
    ate,
    drift,
    relative_pose_auc,
    rpe,
)
from stream3r_core.evaluation.trajectory_files import write_tum

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'


def random_walk(num=40, seed=0, start_ns=1_700_000_000_000_000_000, step_ns=33_333_333):
    """A smooth curved path of ``num`` poses."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (num, 1, 1))
    poses[:, :3, 3] = np.cumsum(rng.normal(0.05, 0.1, (num, 3)), axis=0)
    turns = np.cumsum(rng.normal(0, 0.05, (num, 3)), axis=0)
    poses[:, :3, :3] = Rotation.from_rotvec(turns).as_matrix()
    return Trajectory(start_ns + step_ns * np.arange(num), poses, f'walk{seed}')


def moved(trajectory, scale=1.0, rotvec=(0.3, -0.5, 0.2), shift=(1.0, -2.0, 0.5), noise=0.0):
    """The same path in another frame and scale, with position noise (metres, before scaling)."""
    rng = np.random.default_rng(7)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Rotation.from_rotvec(rotvec).as_matrix(), shift
    poses = trajectory.T_world_camera.copy()
    poses[:, :3, 3] += rng.normal(0, noise, (len(poses), 3)) if noise else 0.0
    poses[:, :3, 3] *= scale
    return Trajectory(trajectory.stamps_ns, T @ poses, 'estimate')


def test_golden_values_of_the_reference_protocol_are_reproduced():
    tensors = load_file(GOLDEN / 'trajectory.safetensors')
    expected = json.loads((GOLDEN / 'evaluation.json').read_text())['trajectory']
    truth = Trajectory(None, tensors['gt_cam_to_world'])
    estimate = Trajectory(None, tensors['est_cam_to_world'])
    error = ate(truth, estimate, 'sim3')
    assert error.rmse == pytest.approx(expected['ate_rmse'], rel=1e-9)
    assert error.scale == pytest.approx(expected['scale'], rel=1e-9)
    np.testing.assert_allclose(error.estimate.T_world_camera, tensors['aligned_est'], atol=1e-12)
    assert rpe(truth, estimate).rmse == pytest.approx(expected['rpe_trans_rmse'], rel=1e-9)
    rotation = rpe(truth, estimate, 'rotation')
    assert rotation.rmse == pytest.approx(expected['rpe_rot_deg_rmse'], rel=1e-9)


def run_evo(command, truth, estimate, *options, home):
    """Statistics that evo's own command line writes for two TUM files."""
    result = home / f'{command}{"".join(options)}.zip'.replace(' ', '')
    places = (str(Path(sys.executable).parent), os.environ['PATH'])
    executable = shutil.which(command, path=os.pathsep.join(places))
    assert executable, f'{command} comes with evo, which this package needs'
    subprocess.run(
        [executable, 'tum', truth, estimate, *options, '--save_results', result],
        env={**os.environ, 'HOME': str(home), 'MPLBACKEND': 'Agg'},
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(result) as archive:
        return json.loads(archive.read('stats.json'))


def assert_equal_statistics(error, evo):
    for name, value in error.statistics.items():
        assert value == pytest.approx(evo[name], rel=1e-7, abs=1e-9), name


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('evo')
    truth = random_walk()
    noisy = moved(truth, scale=0.4, noise=0.02)
    estimate = noisy.take(np.arange(3, 40, 2))  # sparser, and 4 ms late
    estimate = Trajectory(estimate.stamps_ns + 4_000_000, estimate.T_world_camera, 'estimate')
    write_tum(folder / 'truth.txt', truth)
    write_tum(folder / 'estimate.txt', estimate)
    return folder, truth, estimate


@pytest.mark.parametrize('alignment, flags', [('se3', ['-a']), ('sim3', ['-a', '-s'])])
def test_ate_equals_evo_on_the_command_line(files, alignment, flags):
    folder, truth, estimate = files
    evo = run_evo('evo_ape', folder / 'truth.txt', folder / 'estimate.txt', *flags, home=folder)
    assert_equal_statistics(ate(truth, estimate, alignment), evo)


@pytest.mark.parametrize(
    'relation, option', [('translation', 'trans_part'), ('rotation', 'angle_deg')]
)
def test_rpe_equals_evo_on_the_command_line(files, relation, option):
    folder, truth, estimate = files
    evo = run_evo(
        'evo_rpe',
        folder / 'truth.txt',
        folder / 'estimate.txt',
        *('-a', '-s', '--all_pairs', '--pairs_from_reference', '-r', option),
        home=folder,
    )
    assert_equal_statistics(rpe(truth, estimate, relation, 'sim3'), evo)


def test_metrics_write_nothing_into_the_home_folder(tmp_path):
    code = (
        'from stream3r_core.evaluation.trajectory import *; import numpy as np\n'
        'p = np.tile(np.eye(4), (9, 1, 1)); p[:, :3, 3] = np.random.rand(9, 3)\n'
        't = Trajectory(np.arange(9), p)\n'
        'ate(t, t); rpe(t, t); drift(t, t, segment_m=1); relative_pose_auc(t, t)'
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, 'HOME': str(tmp_path), 'PYTHONPATH': str(root)}
    subprocess.run([sys.executable, '-c', code], env=env, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_known_similarity_is_recovered_and_only_sim3_hides_the_scale():
    truth = random_walk()
    estimate = moved(truth, scale=0.25)
    sim3, se3 = ate(truth, estimate, 'sim3'), ate(truth, estimate, 'se3')
    assert sim3.rmse < 1e-12 and sim3.scale == pytest.approx(4.0)
    np.testing.assert_allclose(sim3.estimate.T_world_camera, truth.T_world_camera, atol=1e-12)
    placed = sim3.T_truth_estimate @ estimate.T_world_camera[5, :, 3]
    np.testing.assert_allclose(placed, truth.T_world_camera[5, :, 3], atol=1e-12)
    np.testing.assert_allclose(sim3.truth_xyz_in_estimate, estimate.positions_m, atol=1e-12)
    assert se3.scale == 1.0 and se3.rmse > 0.1


def test_origin_alignment_makes_the_first_poses_equal():
    truth = random_walk()
    error = ate(truth, moved(truth), 'origin')
    assert error.rmse < 1e-12


def test_drift_per_metre_of_a_path_that_is_stretched_by_a_tenth():
    num = 200
    angle = np.linspace(0, np.pi, num)
    poses = np.tile(np.eye(4), (num, 1, 1))
    poses[:, 0, 3], poses[:, 1, 3] = 30 * np.cos(angle), 30 * np.sin(angle)
    truth = Trajectory(np.arange(num), poses)
    stretched = poses.copy()
    stretched[:, :3, 3] *= 1.1
    result = drift(truth, Trajectory(np.arange(num), stretched), 'none')
    assert result.translation_m_per_m == pytest.approx(0.1, rel=0.02)
    assert result.rotation_deg_per_m == pytest.approx(0.0, abs=1e-9)
    assert result.segment_m == pytest.approx(10 * truth.path_length_m / (num - 1), rel=1e-3)


def test_short_paths_are_cut_into_halves():
    truth = random_walk(num=5)
    assert drift(truth, truth, 'none').segment_m == pytest.approx(truth.path_length_m / 2)


def test_relative_pose_auc_counts_the_share_of_pairs_below_each_degree():
    truth = random_walk(num=2)
    turned = truth.T_world_camera.copy()
    centre = turned[1, :3, 3].copy()
    error = Rotation.from_rotvec([0, 0, np.radians(4.5)]).as_matrix()
    turned[1, :3, :3] = turned[1, :3, :3] @ error
    turned[1, :3, 3] = centre
    # One pair: the directions agree in camera 0, so in the turned camera 1 they are 4.5 deg off
    # at most. Below 5 deg it counts in the bin 4..5 only: AUC@5 = 1/5, AUC@3 = 0.
    auc = relative_pose_auc(truth, Trajectory(truth.stamps_ns, turned))
    assert auc == pytest.approx({30: 26 / 30, 15: 11 / 15, 5: 1 / 5, 3: 0.0})


def test_relative_pose_auc_ignores_frame_scale_and_sign_of_the_direction():
    truth = random_walk()
    assert relative_pose_auc(truth, moved(truth, scale=3.0)) == {30: 1, 15: 1, 5: 1, 3: 1}
    mirrored = truth.T_world_camera.copy()
    mirrored[:, :3, 3] *= -1
    assert relative_pose_auc(truth, Trajectory(None, mirrored))[3] == 1


def test_relative_pose_auc_of_a_camera_that_does_not_move_has_a_rotation_error_only():
    truth = random_walk()
    still = truth.T_world_camera.copy()
    still[:, :3, 3] = 1.0
    assert relative_pose_auc(Trajectory(None, still), Trajectory(None, still))[3] == 1
    assert relative_pose_auc(truth, Trajectory(None, still))[30] == 0  # no direction: 90 deg


def test_association_is_exact_at_the_tolerance():
    truth = random_walk(num=5)
    shifted = Trajectory(truth.stamps_ns + 10_000_000, truth.T_world_camera, 'late')
    assert len(associate(truth, shifted, 10_000_000)[0]) == 5
    with pytest.raises(DataError, match='same clock'):
        associate(truth, shifted, 9_999_999)


def test_association_takes_the_nearest_pose_of_the_denser_trajectory():
    dense = random_walk(num=50, step_ns=10_000_000)
    sparse = dense.take(np.arange(0, 50, 7))
    for truth, estimate in ((dense, sparse), (sparse, dense)):
        for side in associate(truth, estimate):
            assert side.stamps_ns.tolist() == sparse.stamps_ns.tolist()


@pytest.mark.parametrize('alignment', ALIGNMENTS)
def test_one_common_pose_is_refused_with_advice(alignment):
    truth = random_walk()
    with pytest.raises(DataError, match='at least 2'):
        ate(truth, truth.take(np.array([4])), alignment)


@pytest.mark.parametrize('alignment', ['se3', 'sim3'])
def test_a_path_on_a_straight_line_has_no_unique_alignment(alignment):
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 0, 3] = np.arange(9)
    line = Trajectory(np.arange(9), poses)
    with pytest.raises(DataError, match='origin'):
        ate(line, line, alignment)
    assert ate(line, line, 'origin').rmse == 0


def test_an_estimate_that_stands_still_is_refused():
    truth = random_walk()
    still = np.tile(np.eye(4), (len(truth), 1, 1))
    with pytest.raises(DataError, match='point or a straight line'):
        ate(truth, Trajectory(truth.stamps_ns, still), 'sim3')


def test_segments_longer_than_the_path_are_refused():
    truth = random_walk(num=4)
    with pytest.raises(DataError, match='smaller'):
        drift(truth, truth, 'none', segment_m=100.0)


def test_no_overlap_in_time_names_both_spans():
    truth = random_walk()
    later = Trajectory(truth.stamps_ns + 10**12, truth.T_world_camera, 'later')
    with pytest.raises(DataError, match=r'1700000000\.000.*1700001000\.000'):
        ate(truth, later)


def test_unequal_lengths_without_stamps_are_refused():
    truth = random_walk()
    with pytest.raises(DataError, match='stamps'):
        ate(Trajectory(None, truth.T_world_camera), truth.take(np.arange(9)))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda p: p[:, :3], r'\[N>=1, 4, 4\]'),
        (lambda p: p[:0], r'\[N>=1, 4, 4\]'),
        (lambda p: p * np.nan, 'pose 0 is not finite'),
        (lambda p: p * np.array([2.0, 1, 1, 1]), 'no rotation'),
        (lambda p: p * np.array([-1.0, 1, 1, 1]), 'no rotation'),
    ],
)
def test_poses_that_are_not_rigid_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        Trajectory(None, change(random_walk().T_world_camera))


def test_stamps_that_are_floats_or_go_back_are_refused():
    poses = random_walk(num=3).T_world_camera
    with pytest.raises(DataError, match='integer'):
        Trajectory(np.array([0.0, 1.0, 2.0]), poses)
    with pytest.raises(DataError, match='pose 2'):
        Trajectory(np.array([0, 5, 4]), poses)
