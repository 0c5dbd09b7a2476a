"""Suites: whole protocols over miniature datasets, resumed, with one failure stopping none."""

import json

import dataset_miniatures as miniatures
import pytest
from oracle import CONFIG

from stream3r_core.config import from_dict, to_dict
from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation import suites
from stream3r_core.evaluation.suites import SUITES, SuiteRun, averages, run_suite, suite
from stream3r_core.evaluation.summary import (
    OWN_ROW,
    as_text,
    other_protocols,
    reference_tables,
    summarise,
    write_summary,
)

CAUSAL = from_dict(type(CONFIG), {**to_dict(CONFIG), 'session': {'mode': 'causal'}})


@pytest.fixture
def data(tmp_path):
    """A data root with two Bonn clips, Sintel and ScanNet."""
    root = tmp_path / 'data'
    for name in ('rgbd_bonn_balloon2', 'rgbd_bonn_crowd2', 'rgbd_bonn_not_in_the_protocol'):
        miniatures.tum_clip(root / 'bonn', 110, name, miniatures.BONN_K)
    miniatures.sintel(root / 'sintel')
    miniatures.scannet_clip(root / 'scannet')
    return root


def run_of(name, data, tmp_path, config=CAUSAL):
    return SuiteRun(name, data, tmp_path / 'out', config)


def good(records):
    return {(r['dataset'], r['clip']) for r in records if not r['failure']}


def test_a_suite_runs_what_is_there_and_names_what_is_not(data, tmp_path):
    run = run_of('mono_depth', data, tmp_path)
    records = run_suite(run, num_workers=0)
    assert good(records) == {
        ('bonn_110', 'rgbd_bonn_balloon2'),
        ('bonn_110', 'rgbd_bonn_crowd2'),
        ('sintel', 'alley_2'),
    }
    missing = {r['dataset']: r['failure'] for r in records if r['failure']}
    assert set(missing) == {'kitti_depth', 'nyu'} and 'not a folder' in missing['nyu']
    assert all(set(r['numbers']) == {'AbsRel', 'δ < 1.25'} for r in records if not r['failure'])


def test_a_rerun_resumes_and_other_options_start_anew(data, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, 'code_version', lambda: '1')  # no commit in between
    run = run_of('mono_depth', data, tmp_path)
    first = run_suite(run, num_workers=0)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('out/**/*.json')}
    assert run_suite(run, num_workers=0) == first
    assert files == {p: p.stat().st_mtime_ns for p in files}
    other = run_of('mono_depth', data, tmp_path, CONFIG)
    assert run_suite(other, num_workers=0)[0]['key'] != first[0]['key']
    monkeypatch.setattr(suites, 'code_version', lambda: '2')
    assert run_suite(run, num_workers=0)[0]['key'] != first[0]['key']


def test_one_broken_clip_stops_no_other_and_is_tried_again(data, tmp_path):
    broken = data / 'bonn/rgbd_bonn_crowd2/groundtruth_110.txt'
    text = broken.read_text()
    broken.write_text('what is this')
    run = run_of('mono_depth', data, tmp_path)
    records = run_suite(run, num_workers=0)
    assert ('bonn_110', 'rgbd_bonn_balloon2') in good(records)
    (failed,) = [r for r in records if r['clip'] == 'rgbd_bonn_crowd2']
    assert 'groundtruth_110.txt' in failed['failure']
    broken.write_text(text)
    assert ('bonn_110', 'rgbd_bonn_crowd2') in good(run_suite(run, num_workers=0))


def test_local_processes_give_the_same_records(data, tmp_path):
    here = run_suite(run_of('camera_pose', data, tmp_path / 'a'), num_workers=0)
    there = run_suite(run_of('camera_pose', data, tmp_path / 'b'), num_workers=2)
    for a, b in zip(here, there):
        assert a['clip'] == b['clip'] and a['failure'] == b['failure']
        assert a.get('numbers', {}) == pytest.approx(b.get('numbers', {}), rel=1e-4, abs=1e-5)


def test_every_suite_names_a_reader_and_a_folder_for_its_parts():
    from stream3r_core.evaluation.datasets import DATASETS

    expected = {
        *('mono_depth', 'video_depth', 'camera_pose', 'co3d_pose', 'mv_recon', 'long_recon')
    }
    assert set(SUITES) == expected
    assert all(part.dataset in DATASETS for s in SUITES.values() for part in s.parts)


def test_co3d_uses_seen_categories_and_averages_over_them(tmp_path):
    miniatures.co3d(tmp_path / 'data/co3d', num_frames=50)
    (tmp_path / 'data/co3d/apple').rename(tmp_path / 'data/co3d/hotdog')
    miniatures.co3d(tmp_path / 'data/co3d', num_frames=50)
    run = run_of('co3d_pose', tmp_path / 'data', tmp_path)
    records = run_suite(run, num_workers=0)
    assert [(r['clip'], r['frames']) for r in records] == [('apple/110_13051_23361', 50)]
    assert list(records[0]['numbers']) == ['AUC@30', 'AUC@15', 'AUC@5', 'AUC@3']
    short = [{'dataset': 'co3d', 'clip': 'apple/s', 'failure': '', 'weight': 0, 'numbers': {}}]
    assert averages(run, short) == {}
    many = short + [
        {'dataset': 'co3d', 'clip': clip, 'failure': '', 'weight': 1, 'numbers': {'AUC@30': auc}}
        for clip, auc in (('apple/a', 1.0), ('apple/b', 0.0), ('vase/c', 0.1))
    ]
    assert averages(run, many)['co3d']['AUC@30'] == pytest.approx(0.3)


def test_depth_is_averaged_over_pixels_and_poses_over_clips(tmp_path):
    def records(name):
        return [
            {'dataset': 'sintel', 'clip': c, 'failure': '', 'weight': w, 'numbers': {name: v}}
            for c, w, v in (('a', 300, 0.1), ('b', 100, 0.5))
        ]

    depth = averages(run_of('mono_depth', tmp_path, tmp_path), records('AbsRel'))
    poses = averages(run_of('camera_pose', tmp_path, tmp_path), records('ATE RMSE (m)'))
    assert depth['sintel']['AbsRel'] == pytest.approx(0.2)
    assert poses['sintel']['ATE RMSE (m)'] == pytest.approx(0.3)


def test_reconstruction_suites_run_with_open3d_and_fail_clearly_without(tmp_path):
    miniatures.seven_scenes(tmp_path / 'data/7scenes', (480, 640))
    run = run_of('mv_recon', tmp_path / 'data', tmp_path)
    record = next(r for r in run_suite(run, num_workers=0) if r['clip'])
    assert record['clip'] == 'chess/seq-03'
    try:
        import open3d  # noqa: F401
    except ImportError:
        assert 'pip install' in record['failure']
    else:
        assert not record['failure'] and record['numbers']['Acc mean (m)'] > 0


def test_no_dataset_at_all_and_unknown_suites_are_refused(tmp_path):
    with pytest.raises(DataError, match='no dataset of mono_depth'):
        run_suite(run_of('mono_depth', tmp_path / 'nowhere', tmp_path), num_workers=0)
    with pytest.raises(ConfigError, match='mono_depth, video_depth'):
        suite('stereo')


def own_records(dataset, numbers):
    return [
        {
            **{'dataset': dataset, 'clip': 'a', 'failure': '', 'weight': 1.0, 'frames': 7},
            **{'numbers': numbers, 'remarks': ['a remark'], 'conditions': {'device': 'cpu'}},
        }
    ]


def test_published_rows_stand_beside_the_run_only_under_the_same_protocol(tmp_path):
    numbers = {'Acc mean (m)': 0.5, 'Acc median (m)': 0.4, 'NC mean': 0.6}
    records = own_records('7scenes_test', numbers)
    (own,) = summarise(run_of('long_recon', tmp_path, tmp_path), records)
    assert own.rows[OWN_ROW][:3] == [0.5, 0.4, 0.6]
    assert own.rows['STream3R with STAC'][own.columns.index('NC mean')] == 0.606
    assert any('second-hand' in remark for remark in own.remarks)
    assert any('registration' in remark for remark in own.remarks)
    (sparse,) = summarise(run_of('mv_recon', tmp_path, tmp_path), records)
    assert list(sparse.rows) == [OWN_ROW]
    others = other_protocols(run_of('mv_recon', tmp_path, tmp_path))
    assert others and all(OWN_ROW not in entry.rows for entry in others)


def test_every_published_table_states_its_source_and_has_full_rows():
    tables = reference_tables()
    protocols = {p.protocol for s in SUITES.values() for p in s.parts if p.protocol}
    assert len({t.protocol for t in tables}) == len(tables)
    for entry in tables:
        assert entry.source and entry.title and entry.rows
        assert all(len(row) == len(entry.columns) for row in entry.rows.values())
        assert entry.protocol in protocols or entry.protocol.startswith('other/')


def test_the_summary_is_written_as_json_page_and_text(data, tmp_path):
    run = run_of('camera_pose', data, tmp_path)
    records = run_suite(run, num_workers=0)
    tables = write_summary(run, records)
    content = json.loads((tmp_path / 'out/camera_pose/summary.json').read_text())
    assert set(content['averages']) == {'sintel', 'scannet_90'}
    assert content['conditions']['weights']['source'] == 'random'
    assert [f[0] for f in content['failures']] == ['tum_90']
    page = (tmp_path / 'out/camera_pose/summary.html').read_text()
    assert 'STream3R, full cache' in page and 'Failed or missing' in page
    text = as_text(tables[0])
    assert text.splitlines()[0].startswith('sintel') and OWN_ROW in text
