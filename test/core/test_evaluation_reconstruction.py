"""Map metrics: golden values, known answers, both ICP variants, refusals."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from stream3r_core.errors import DataError, MissingDependencyError
from stream3r_core.evaluation.reconstruction import (
    align_point_maps,
    centre_crop,
    cloud_errors,
    estimate_normals,
    icp,
    map_errors,
)

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN / 'mvrecon.safetensors')


@pytest.fixture
def needs_open3d():
    pytest.importorskip('open3d', reason="needs Open3D: pip install 'stream3r_ros[open3d]'")


def stacked(golden, name):
    return torch.cat(
        [golden[f'{part}{i}.{rest}'] for part, rest in [name.split('.')] for i in range(3)]
    )


def test_golden_alignment_of_the_reference_is_reproduced(golden):
    T_world_anchor = golden['gt0.camera_pose'][0]
    aligned = align_point_maps(
        stacked(golden, 'pred.pts3d'),
        stacked(golden, 'gt.pts3d'),
        stacked(golden, 'gt.valid_mask'),
        T_world_anchor,
    )
    assert aligned.truth_shift_z_m == pytest.approx(golden['monitor.gt_shift_z'].item(), rel=1e-6)
    assert aligned.prediction_shift_z == golden['monitor.pred_shift_z'].item()
    ratio = golden['monitor.gt_scale'] / golden['monitor.pred_scale']
    assert aligned.scale == pytest.approx(ratio.item(), rel=1e-6)
    # The reference that made the golden file stays in the anchor camera, shifted to median z 0.
    T = torch.linalg.inv(T_world_anchor.double())
    for ours, theirs in (('prediction', 'aligned.pred'), ('truth', 'aligned.gt')):
        camera = getattr(aligned, ours).double() @ T[:3, :3].T + T[:3, 3]
        camera[..., 2] -= aligned.truth_shift_z_m
        torch.testing.assert_close(camera.float(), stacked(golden, theirs), atol=1e-5, rtol=1e-5)


def test_golden_accuracy_completeness_and_normal_consistency_are_reproduced(golden):
    expected = json.loads((GOLDEN / 'evaluation.json').read_text())
    clouds = [golden[k].numpy() for k in ('cloud_pred', 'cloud_gt', 'normal_pred', 'normal_gt')]
    summary = cloud_errors(*clouds).summary
    accuracy = [
        summary[k]
        for k in (
            'accuracy_mean_m',
            'accuracy_median_m',
            'normal_consistency_1',
            'normal_consistency_1_median',
        )
    ]
    completeness = [
        summary[k]
        for k in (
            'completeness_mean_m',
            'completeness_median_m',
            'normal_consistency_2',
            'normal_consistency_2_median',
        )
    ]
    assert accuracy == pytest.approx(expected['acc_accmed_nc1_nc1med'], rel=1e-6)
    assert completeness == pytest.approx(expected['comp_compmed_nc2_nc2med'], rel=1e-6)


def wall(num=4000, seed=0):
    """Points of a corner of a room: two walls and the floor, 2 m each."""
    rng = np.random.default_rng(seed)
    points = rng.random((num, 3)) * 2
    points[np.arange(num), rng.integers(0, 3, num)] = 0
    return points


def test_a_cloud_equals_itself():
    summary = cloud_errors(wall(), wall()).summary
    assert summary['accuracy_mean_m'] == summary['completeness_mean_m'] == 0
    assert summary['f_score'] == summary['precision'] == summary['recall'] == 1
    assert 'normal_consistency' not in summary


def test_half_of_a_map_is_accurate_but_not_complete():
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(40), [0]), -1).reshape(-1, 3) * 0.1
    summary = cloud_errors(grid[grid[:, 0] < 1.95], grid, threshold_m=0.05).summary
    assert summary['accuracy_mean_m'] == 0 and summary['precision'] == 1
    assert summary['recall'] == pytest.approx(0.5)
    assert summary['completeness_mean_m'] == pytest.approx(0.5 * 0.1 * np.mean(np.arange(1, 21)))
    assert summary['f_score'] == pytest.approx(2 / 3)


def test_a_shifted_plane_has_the_shift_as_error():
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(40), [0]), -1).reshape(-1, 3) * 0.1
    errors = cloud_errors(grid + np.array([0, 0, 0.03]), grid)
    np.testing.assert_allclose(errors.accuracy_m, 0.03)
    np.testing.assert_allclose(errors.completeness_m, 0.03)


def test_nearest_neighbours_equal_a_brute_force_search():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(300, 3)), rng.normal(size=(200, 3)) * [5, 1, 0.1]
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    errors = cloud_errors(a, b)
    np.testing.assert_allclose(errors.accuracy_m, distances.min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(errors.completeness_m, distances.min(axis=0), rtol=1e-12)


def test_normals_of_any_sign_count_by_the_angle_between_them():
    points = wall(50)
    up = np.tile([0.0, 0, 1], (50, 1))
    tilted = np.tile([0, -np.sin(0.5), -np.cos(0.5)], (50, 1))
    summary = cloud_errors(points, points, tilted, up).summary
    assert summary['normal_consistency'] == pytest.approx(np.cos(0.5))
    assert summary['normal_consistency_median'] == pytest.approx(np.cos(0.5))


def test_point_maps_of_another_scale_and_depth_shift_are_brought_onto_the_truth():
    rng = np.random.default_rng(0)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Rotation.from_rotvec([0.4, 1.0, -0.2]).as_matrix(), [3, -1, 2]
    T = torch.from_numpy(T)
    camera = torch.from_numpy(rng.random((2, 20, 30, 3)) * 4 + [0, 0, 2])
    truth = camera @ T[:3, :3].T + T[:3, 3]
    prediction = camera / 7 + torch.tensor([0, 0, 0.3], dtype=torch.float64)
    valid = torch.from_numpy(rng.random((2, 20, 30)) < 0.8)
    prediction[~valid] = float('nan')
    aligned = align_point_maps(prediction, truth, valid, T)
    assert aligned.scale == pytest.approx(7)
    torch.testing.assert_close(aligned.prediction[valid], truth[valid])


def test_the_centre_crop_keeps_the_middle_and_small_maps():
    maps = torch.arange(2 * 10 * 8).reshape(2, 10, 8)
    assert torch.equal(centre_crop(maps, 4), maps[:, 3:7, 2:6])
    assert torch.equal(centre_crop(maps, 9), maps[:, 0:9, :])
    assert centre_crop(torch.zeros(1, 392, 518, 3)).shape == (1, 224, 224, 3)


@pytest.mark.parametrize('variant', ['point_to_point', 'point_to_plane'])
def test_icp_recovers_a_small_rigid_motion(needs_open3d, variant):
    truth = wall()
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = (
        Rotation.from_rotvec([0.01, -0.008, 0.01]).as_matrix(),
        [0.01, 0.01, 0.01],
    )
    moved = (truth - T[:3, 3]) @ T[:3, :3]  # T brings it back
    result = icp(moved, truth, variant)
    assert result.variant == variant and result.fitness == 1
    np.testing.assert_allclose(result.T_truth_prediction, T, atol=2e-3)
    assert result.voxel_m == 0 and result.num_points == (4000, 4000)


def test_icp_of_large_clouds_runs_on_a_stated_voxel_grid(needs_open3d):
    truth = wall(20_000)
    result = icp(truth + 0.004, truth, max_points=5000)
    assert result.voxel_m > 0 and max(result.num_points) <= 5000
    np.testing.assert_allclose(result.T_truth_prediction[:3, 3], -0.004, atol=2e-3)


def test_map_errors_register_first_and_judge_normals(needs_open3d):
    result = map_errors(wall(seed=1) + 0.01, wall(seed=2))
    raw = cloud_errors(wall(seed=1) + 0.01, wall(seed=2)).summary
    summary = result.errors.summary
    assert summary['accuracy_mean_m'] < raw['accuracy_mean_m']
    assert summary['normal_consistency'] > 0.9
    np.testing.assert_allclose(np.abs(estimate_normals(wall())).max(axis=1).mean(), 1, atol=0.05)


def test_without_open3d_the_error_names_reason_and_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'open3d', None)
    with pytest.raises(MissingDependencyError, match='pip install'):
        map_errors(wall(), wall())
    assert icp(wall(), wall(), 'none').variant == 'none'


@pytest.mark.parametrize(
    'cloud, message',
    [
        (np.empty((0, 3)), 'no depth or no confident point'),
        (np.zeros((4, 2)), 'points'),
        (np.full((4, 3), np.nan), 'finite'),
    ],
)
def test_empty_or_broken_clouds_are_refused(cloud, message):
    with pytest.raises(DataError, match=message):
        cloud_errors(cloud, wall())
    with pytest.raises(DataError, match=message):
        icp(wall(), cloud)


def test_point_maps_without_valid_pixels_and_unknown_variants_are_refused():
    maps = torch.zeros(1, 4, 4, 3)
    with pytest.raises(DataError, match='depth files'):
        align_point_maps(maps, maps, torch.zeros(1, 4, 4, dtype=torch.bool), torch.eye(4))
    with pytest.raises(DataError, match='point_to_point, point_to_plane'):
        icp(wall(), wall(), 'generalised')
