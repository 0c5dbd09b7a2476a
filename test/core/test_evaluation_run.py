"""One evaluation from frames to report: known answers, what is skipped, what survives."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from dataset_miniatures import NORMAL, OFFSET_M, Scene, camera, plane_depth
from oracle import CONFIG, Oracle, room_clip
from scipy.spatial.transform import Rotation

from stream3r_core.config import CoreConfig, MappingConfig, from_dict, to_dict
from stream3r_core.errors import DataError, OutputError
from stream3r_core.evaluation import judge
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.datasets.frames import Clip, Frame
from stream3r_core.evaluation.pipelines import make_pipeline
from stream3r_core.evaluation.report import Report, read_report
from stream3r_core.evaluation.run import FILES, evaluate
from stream3r_core.evaluation.trajectory import Trajectory
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.evaluation.truth_map import TruthMap
from stream3r_core.mapping import VoxelMap, load_ply
from stream3r_core.pipeline import load_configured_model

QUICK = EvaluationConfig(icp='none', pictures=False)
WITH_PICTURES = EvaluationConfig(icp='none')


@pytest.fixture(scope='module')
def clip():
    return room_clip()


@pytest.fixture(scope='module')
def results(clip, tmp_path_factory):
    """Folder and report of an estimate that is the truth at 0.4 of its size."""
    folder = tmp_path_factory.mktemp('oracle') / 'results'
    return folder, evaluate(clip, Oracle(clip, scale=0.4), folder, WITH_PICTURES)


def test_a_known_similarity_gives_the_known_answer(results):
    _, report = results
    assert report.value('ATE RMSE', 'Sim(3)') < 1e-5
    assert report.value('recovered scale', 'Sim(3)') == pytest.approx(2.5, rel=1e-4)
    assert report.value('ATE RMSE', 'SE(3)') > 0.01
    assert report.value('relative pose AUC@3') == pytest.approx(1, abs=0.02)
    for alignment in ('median', 'scale', 'lstsq'):
        assert report.value('AbsRel', alignment) < 1e-4
        assert report.value('scale', alignment) == pytest.approx(2.5, rel=1e-3)
    assert report.value('AbsRel', 'metric') == pytest.approx(0.6, rel=1e-4)
    assert report.value('coverage', 'median') == 1
    how = next(m.alignment for m in report.metrics if m.group == 'map')
    assert how.startswith('Sim(3)') and report.value('accuracy mean', how) < 0.02
    assert not any('times its size' in remark for remark in report.remarks)
    assert report.value('cache, largest') == 1024 / 2**20  # bytes of the oracle, in MiB


def test_drift_is_in_percent_and_turn_in_degrees_per_metre_of_a_known_error():
    """A path a tenth too long, its cameras rolling two degrees more with every metre."""
    along_m = np.arange(0, 10, 0.25)
    angle = along_m / 100  # of a wide arc: chords are as long as the path
    poses = np.tile(np.eye(4), (len(along_m), 1, 1))
    poses[:, :3, :3] = Rotation.from_euler('y', angle[:, None]).as_matrix()
    poses[:, 0, 3], poses[:, 2, 3] = 100 * (1 - np.cos(angle)), 100 * np.sin(angle)
    wrong = poses.copy()
    wrong[:, :3, 3] *= 1.1
    roll = Rotation.from_euler('z', 2 * along_m[:, None], degrees=True)
    wrong[:, :3, :3] = poses[:, :3, :3] @ roll.as_matrix()
    report = Report('arc', {}, {})
    config = dataclasses.replace(QUICK, drift_segment_m=2.0)
    judge.judge_trajectories(report, [Trajectory(None, poses)], Trajectory(None, wrong), config)
    found = {(m.name, m.alignment): (m.value, m.unit) for m in report.metrics}
    assert found['drift over 2 m', 'SE(3)'] == (pytest.approx(10, abs=0.2), '%')
    assert found['turn over 2 m', 'SE(3)'] == (pytest.approx(2, abs=0.02), 'deg/m')
    assert found['drift over 2 m', 'Sim(3)'][0] < 0.2


def test_true_depth_of_half_the_image_size_makes_the_same_true_map():
    scene = Scene(camera(), size_hw=(24, 32))
    K_half = camera(15.0, 15.5, 7.5, 5.25)  # pixel centres lie at whole numbers
    truth = TruthMap(0.01, 10_000)
    for image, T in zip(scene.images, scene.T_world_camera):
        frame = Frame('half', 0, None, K=scene.K, T_world_camera=T)
        truth.add(frame, image, plane_depth(T, K_half, (12, 16)))
    points = truth.cloud().points_xyz
    assert len(points) > 300
    assert np.abs(points @ NORMAL - OFFSET_M).max() < 1e-4


def test_every_promised_file_is_written_and_readable(results, clip):
    folder, report = results
    assert {p.name for p in folder.iterdir()} == set(FILES)
    estimate = read_trajectory(folder / 'trajectory.tum')
    assert estimate.stamps_ns.tolist() == [f.stamp_ns for f in clip.frames]
    kitti = read_trajectory(folder / 'trajectory.kitti')
    np.testing.assert_allclose(kitti.T_world_camera, estimate.T_world_camera, atol=1e-12)
    truth = read_trajectory(folder / 'truth.tum')
    np.testing.assert_allclose(truth.T_world_camera, clip.truth.T_world_camera, atol=1e-6)
    assert len(load_ply(folder / 'map.ply')) == report.value('map points')
    assert len((folder / 'frames.csv').read_text().splitlines()) == 1 + len(clip)
    assert yaml.safe_load((folder / 'config.yaml').read_text())['evaluation']['icp'] == 'none'


def test_the_report_reads_back_and_states_its_conditions(results):
    folder, report = results
    back = read_report(folder / 'report.json')
    assert back.metrics == report.metrics and back.skipped == report.skipped
    assert {'code', 'weights', 'device', 'dtype', 'versions', 'date'} <= set(back.conditions)
    assert back.conditions['weights']['source'] == 'random'
    assert all(m.unit or m.group != 'speed' for m in back.metrics)


def test_the_page_is_self_contained(results):
    page = (results[0] / 'report.html').read_text()
    assert page.count('data:image/png;base64,') >= 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert 'http' not in re.sub(r'base64,[^"]*', '', page)


def test_no_page_or_report_carries_markup_from_names(clip, tmp_path):
    named = dataclasses.replace(clip.every(3), name='<script>alert(1)</script>')
    evaluate(named, Oracle(clip), tmp_path, QUICK)
    assert '<script>' not in (tmp_path / 'report.html').read_text()


def test_a_map_whose_depth_has_another_scale_than_its_path_has_a_remark(clip, tmp_path):
    frames = tuple(
        dataclasses.replace(f, load_depth_m=lambda load=f.load_depth_m: load() / 2)
        for f in clip.frames
    )
    flatter = dataclasses.replace(clip, frames=frames)
    report = evaluate(flatter, Oracle(clip, scale=0.4), tmp_path, QUICK)
    (remark,) = (r for r in report.remarks if 'times its size' in r)
    assert 'truth at 2.5 times' in remark and 'depth at 1.25 times' in remark
    assert 'the map is 2 times as large' in remark


def test_map_metrics_recover_the_room(clip, tmp_path):
    pytest.importorskip('open3d', reason="needs Open3D: pip install 'stream3r_ros[open3d]'")
    report = evaluate(clip, Oracle(clip), tmp_path, EvaluationConfig(pictures=False))
    how = next(m.alignment for m in report.metrics if m.group == 'map')
    assert 'point-to-point' in how
    assert report.value('accuracy mean', how) < 0.015  # voxels of 0.02 m
    assert report.value('F-score at 0.05 m', how) > 0.99


def test_without_open3d_the_rest_runs_and_the_map_is_skipped_with_a_remedy(
    clip, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, 'open3d', None)
    report = evaluate(clip, Oracle(clip), tmp_path, EvaluationConfig(pictures=False))
    assert [s.group for s in report.skipped] == ['map']
    assert 'pip install' in report.skipped[0].reason
    assert 'pip install' in (tmp_path / 'report.html').read_text()
    assert report.value('ATE RMSE', 'Sim(3)') < 1e-5
    assert not any(m.group == 'map' for m in report.metrics)


def test_an_input_without_truth_is_reported_with_what_is_missing(clip, tmp_path):
    bare = [dataclasses.replace(f, T_world_camera=None, load_depth_m=None) for f in clip.frames]
    report = evaluate(Clip('bare', tuple(bare)), Oracle(clip), tmp_path)
    assert [s.group for s in report.skipped] == ['trajectory', 'depth', 'map']
    assert {m.group for m in report.metrics} == {'speed'}


def test_two_truths_are_judged_side_by_side(clip, tmp_path):
    shifted = clip.truth.T_world_camera.copy()
    shifted[::2, :3, 3] += 0.05
    other = Trajectory(clip.truth.stamps_ns, shifted, 'other truth')
    report = evaluate(clip, Oracle(clip), tmp_path, QUICK, more_truths=[other])
    assert report.value('ATE RMSE', 'Sim(3)', 'truth of room') < 1e-5
    assert report.value('ATE RMSE', 'Sim(3)', 'other truth') > 0.01
    assert report.value('RPE rotation RMSE, 1 frame', 'SE(3)', 'other truth') < 1e-3
    page = (tmp_path / 'report.html').read_text()
    assert 'against truth of room' in page and 'against other truth' in page


def test_drift_is_taken_over_one_length_and_its_failure_has_its_name(clip, tmp_path):
    shrunk = clip.truth.T_world_camera.copy()
    shrunk[:, :3, 3] *= 0.5
    other = Trajectory(clip.truth.stamps_ns, shrunk, 'half the size')
    report = evaluate(clip, Oracle(clip), tmp_path, QUICK, more_truths=[other])
    drifts = {(m.name, m.truth) for m in report.metrics if m.name.startswith('drift')}
    assert len({name for name, _ in drifts}) == 1
    config = dataclasses.replace(QUICK, drift_segment_m=1000.0)
    report = evaluate(clip, Oracle(clip), tmp_path, config)
    (skipped,) = (s for s in report.skipped if s.group == 'trajectory')
    assert skipped.reason.startswith('drift: ') and report.value('ATE RMSE', 'Sim(3)') < 1e-5


def test_thinned_pose_pairs_an_empty_map_and_absent_intrinsics_are_remarks(
    clip, tmp_path, monkeypatch
):
    report = evaluate(clip, Oracle(clip), tmp_path, QUICK)
    assert not any('AUC' in remark or 'pixels' in remark for remark in report.remarks)
    monkeypatch.setattr(judge, 'AUC_FRAMES', 5)
    oracle = Oracle(clip)
    oracle.map = VoxelMap(MappingConfig(voxel_size=0.01, min_confidence=100.0))
    bare = [dataclasses.replace(frame, K=None) for frame in clip.frames]
    config = dataclasses.replace(QUICK, known_intrinsics=True)
    report = evaluate(Clip('bare', tuple(bare)), oracle, tmp_path, config)
    assert 'relative pose AUC: 5 poses, evenly spread' in report.remarks
    assert any('only 0 % of the pixels' in r and 'min_confidence' in r for r in report.remarks)
    assert (
        f'known_intrinsics: {len(clip)} frames have none; theirs are predicted' in report.remarks
    )


def test_frames_that_cannot_be_used_are_named_and_the_rest_counts(clip, tmp_path):
    def broken():
        raise DataError('the file is cut short')

    frames = list(clip.frames)
    frames[2] = dataclasses.replace(frames[2], load_image=broken)
    frames[4] = dataclasses.replace(frames[4], load_depth_m=broken)
    damaged = dataclasses.replace(clip, frames=tuple(frames))
    model = load_configured_model(CONFIG.model)
    report = evaluate(damaged, make_pipeline(model, CONFIG), tmp_path, QUICK)
    assert report.num_frames == len(clip) - 1
    assert report.refused == ['frame 2: the file is cut short']
    assert any('frame 4: no true depth' in remark for remark in report.remarks)
    assert len(read_trajectory(tmp_path / 'trajectory.tum')) == len(clip) - 1


def test_a_real_network_gets_the_image_only(clip, tmp_path):
    """Ground truth never enters a result: wrong truth changes the metrics, not the estimate."""
    model = load_configured_model(CONFIG.model)
    lies = tuple(
        dataclasses.replace(f, T_world_camera=np.eye(4), K=np.eye(3), load_depth_m=None)
        for f in clip.frames
    )
    evaluate(clip, make_pipeline(model, CONFIG), tmp_path / 'a', QUICK)
    evaluate(Clip('lies', lies), make_pipeline(model, CONFIG), tmp_path / 'b', QUICK)
    for name in ('trajectory.tum', 'map.ply'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


def test_known_intrinsics_are_used_when_asked_for(clip, tmp_path):
    model = load_configured_model(CONFIG.model)
    maps = []
    for known in (False, True):
        config = dataclasses.replace(QUICK, known_intrinsics=known)
        evaluate(clip.every(4), make_pipeline(model, CONFIG), tmp_path, config)
        maps.append((tmp_path / 'map.ply').read_bytes())
    assert maps[0] != maps[1]


@pytest.mark.parametrize('mode', ['stac_paper', 'full'])
def test_answers_that_come_together_belong_to_their_own_frames(clip, tmp_path, mode):
    """Chunks (published STAC) and photo sets answer several frames at a time."""
    config = from_dict(CoreConfig, {**to_dict(CONFIG), 'session': {'mode': mode}})
    pipeline = make_pipeline(load_configured_model(config.model), config)
    frames = list(clip.take(range(6)).frames)
    frames[3] = dataclasses.replace(frames[3], load_image=lambda: np.zeros((0, 4, 3), np.uint8))
    report = evaluate(Clip('six', tuple(frames)), pipeline, tmp_path, QUICK)
    assert report.num_frames == 5 and report.refused[0].startswith('frame 3:')
    stamps = [f.stamp_ns for i, f in enumerate(frames) if i != 3]
    assert read_trajectory(tmp_path / 'trajectory.tum').stamps_ns.tolist() == stamps
    assert report.value('map points') > 0


def test_an_interrupted_run_reports_what_it_has(clip, tmp_path):
    count = iter(range(100))
    report = evaluate(clip, Oracle(clip), tmp_path, QUICK, lambda: next(count) >= 5)
    assert report.interrupted and report.num_frames == 5
    assert json.loads((tmp_path / 'report.json').read_text())['interrupted'] is True
    assert 'interrupted' in (tmp_path / 'report.html').read_text()


def test_nothing_usable_and_no_place_to_write_are_refused(clip, tmp_path):
    def broken():
        raise DataError('no image')

    frames = tuple(dataclasses.replace(f, load_image=broken) for f in clip.frames)
    with pytest.raises(DataError, match='none of the images'):
        evaluate(Clip('broken', frames), Oracle(clip), tmp_path / 'a')
    assert not (tmp_path / 'a').exists()
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='cannot write'):
        evaluate(clip, Oracle(clip), tmp_path / 'file')


@pytest.mark.parametrize('text', ['', '[]', '{"format": 99}', '{"format": 1, "name": "a"}'])
def test_a_foreign_report_is_refused(tmp_path, text):
    (tmp_path / 'report.json').write_text(text)
    with pytest.raises(DataError, match='report'):
        read_report(tmp_path / 'report.json')
    with pytest.raises(DataError, match='cannot read'):
        read_report(tmp_path / 'none.json')


def test_importing_the_evaluation_loads_no_optional_package():
    names = 'run, suites, summary, compare, exports, jobs, datasets'
    code = (
        f'import sys; from stream3r_core.evaluation import {names}; '
        'print(*{m.split(".")[0] for m in sys.modules})'
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=root, check=True
    )
    optional = {'rclpy', 'rosbags', 'triton', 'open3d', 'matplotlib', 'evo', 'trimesh', 'ray'}
    assert 'torch' in run.stdout and not optional & set(run.stdout.split())
