"""Suites: whole protocols over miniature datasets, resumed, with one failure stopping none."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import dataset_miniatures as miniatures
import pytest
from oracle import CONFIG

from stream3r_core.config import ModelConfig, from_dict, to_dict
from stream3r_core.errors import ConfigError, DataError
from stream3r_core.evaluation import suites, summary
from stream3r_core.evaluation.datasets.frames import Clip, Frame
from stream3r_core.evaluation.datasets.sintel import POSE_SEQUENCES
from stream3r_core.evaluation.fingerprint import weights_digest
from stream3r_core.evaluation.protocols import ImageSizes, image_sizes
from stream3r_core.evaluation.suites import SUITES, SuiteRun, averages, run_suite, suite
from stream3r_core.evaluation.summary import (
    ReferenceTable,
    as_text,
    other_protocols,
    own_row,
    reference_tables,
    summarise,
    write_summary,
)
from stream3r_core.pipeline import load_configured_model

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
    absent = {(r['dataset'], r['clip']): r['failure'] for r in records if r['is_absent']}
    datasets = {('kitti_depth', ''), ('nyu', '')}
    names = {('bonn_110', f'rgbd_bonn_{n}') for n in ('crowd3', 'person_tracking2', 'synchronous')}
    assert set(absent) == datasets | names
    assert 'not a folder' in absent['nyu', ''] and all(absent.values())
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


def test_what_the_numbers_depend_on_is_in_the_key(data, tmp_path, monkeypatch):
    def keys(run, **changes):
        planned = list(suites._planned(run, dataclasses.replace(part, **changes)))
        return {record['key'] for record in planned if not record['is_absent']}

    part = next(p for p in SUITES['mono_depth'].parts if p.dataset == 'bonn_110')
    run = run_of('mono_depth', data, tmp_path)
    first = keys(run)
    assert first == keys(run) and len(first) == 1
    assert keys(run, options=(('max_depth_m', 10), ('clip_depth_m', None))) != first
    shutil.copytree(data, tmp_path / 'copy')
    assert keys(dataclasses.replace(run, data=tmp_path / 'copy')) != first
    monkeypatch.chdir(tmp_path)
    assert keys(dataclasses.replace(run, data=Path('data'))) == first
    image = next((data / 'bonn').rglob('*.png'))
    os.utime(image, ns=(0, 0))
    assert keys(run) != first


def test_other_weights_under_the_same_name_are_another_key(data, tmp_path):
    weights = tmp_path / 'mine.safetensors'
    config = from_dict(type(CAUSAL), {**to_dict(CAUSAL), 'model': {'weights': str(weights)}})
    keys = set()
    for content in (b'one', b'two'):
        weights.write_bytes(content)
        weights_digest.cache_clear()
        run = run_of('mono_depth', data, tmp_path, config)
        keys.add(suites._key(run, SUITES['mono_depth'].parts[0]))
    assert len(keys) == 2


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


def test_the_reference_says_where_each_dataset_of_a_suite_lies():
    page = (Path(__file__).parents[2] / 'stream3r_ros/REFERENCE.md').read_text()
    for name, chosen in SUITES.items():
        assert f'`{name}`' in page
        for part in chosen.parts:
            assert f'{part.dataset}: `{part.folder}`' in page


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
            for c, w, v in (('alley_2', 300, 0.1), ('cave_2', 100, 0.5))
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


WHOLE = {**dict.fromkeys(POSE_SEQUENCES, 50), 'ambush_4': 33, 'ambush_6': 20, 'market_6': 40}


def own_records(dataset, numbers, clips=('a',), long_side=518):
    common = {'dataset': dataset, 'failure': '', 'weight': 1.0, 'frames': 7, 'numbers': numbers}
    told = {'remarks': ['a remark'], 'conditions': {'device': 'cpu'}}
    told |= {'image_sizes': {'long_side': long_side}}
    return [common | told | {'clip': clip, 'clip_frames': WHOLE.get(clip, 1000)} for clip in clips]


def test_published_rows_stand_beside_the_run_only_under_the_same_protocol(tmp_path):
    run = run_of('camera_pose', tmp_path, tmp_path)
    records = own_records('sintel', {'ATE RMSE (m)': 0.5}, POSE_SEQUENCES)
    (own,) = summarise(run, records)
    assert own.rows[own_row(run)] == [0.5, None]
    assert own.rows['STream3R with STAC'] == [None, 1.486]
    assert any('second-hand' in remark for remark in own.remarks)
    assert not any('Sintel' in entry.title for entry in other_protocols(run, records))
    (fewer,) = summarise(run, records[1:])
    assert list(fewer.rows) == [own_row(run)] and '13 of 14 clips' in fewer.remarks[0]
    (apart,) = (t for t in other_protocols(run, records[1:]) if 'Sintel' in t.title)
    assert 'its 14 clips are not the 13 judged here' in apart.remarks[-1]


def test_a_small_network_on_a_short_sintel_stands_beside_nobody(data, tmp_path):
    for name in POSE_SEQUENCES[1:]:
        for kind in ('final', 'depth', 'camdata_left'):
            folder = data / 'sintel/training' / kind
            shutil.copytree(folder / POSE_SEQUENCES[0], folder / name)
    run = run_of('camera_pose', data, tmp_path)
    records = [r for r in run_suite(run, num_workers=0) if r['dataset'] == 'sintel']
    (own,) = write_summary(run, records)
    assert list(own.rows) == [own_row(run)] == ['this run: causal, tiny, random']
    (apart,) = (t for t in other_protocols(run, records) if 'Sintel' in t.title)
    side = load_configured_model(CAUSAL.model).config.img_size
    assert 'its clip alley_2 has 50 frames, here 3' in apart.remarks
    assert f'its images have a long side of 518, here {side}' in apart.remarks
    page = (tmp_path / 'out/camera_pose/summary.html').read_text()
    assert f'whole sequences, long side {side}, Sim(3)' in page
    assert 'session.mode' in page


SUITE_PARTS = {  # folder, frames judged of 1200 and of 600, max and clip depth (m)
    'mono_depth': {
        'sintel': ('sintel', 1200, 600, 70, 70),
        'bonn_110': ('bonn', 1200, 600, 70, None),
        'kitti_depth': ('kitti', 1200, 600, None, None),
        'nyu': ('nyu-v2', 1200, 600, None, None),
    },
    'video_depth': {
        'sintel': ('sintel', 1200, 600, 70, 70),
        'bonn_110': ('bonn', 1200, 600, 70, None),
        'kitti_depth_video': ('kitti', 1200, 600, None, None),
    },
    'camera_pose': {
        'tum_90': ('tum', 1200, 600),
        'sintel': ('sintel', 1200, 600),
        'scannet_90': ('scannet', 1200, 600),
    },
    'co3d_pose': {'co3d': ('co3d', 1200, 600)},
    'mv_recon': {'7scenes_test': ('7scenes', 6, 3), 'neural_rgbd': ('neural_rgbd', 3, 2)},
    'long_recon': {
        '7scenes_test': ('7scenes', 240, 120),
        'neural_rgbd': ('neural_rgbd', 240, 120),
    },
}
LABELS = {1200: 'all', 240: 'every 5th', 6: 'every 200th', 3: 'every 500th, two at least'}


@pytest.mark.parametrize('name', SUITES)
def test_the_constants_of_every_suite_are_the_published_ones(name):
    frames = [Frame(str(i), i, load_image=None) for i in range(1200)]
    found = {
        part.dataset: (
            part.folder,
            len(part.thin(Clip('long', frames))),
            len(part.thin(Clip('short', frames[:600]))),
            *(value for _, value in part.options),
        )
        for part in SUITES[name].parts
    }
    assert found == SUITE_PARTS[name]
    for part in SUITES[name].parts:
        assert part.frames == LABELS[found[part.dataset][1]]
        assert tuple(n for n, _ in part.options) in ((), ('max_depth_m', 'clip_depth_m'))


def test_images_have_the_published_sizes_in_proportion_to_the_network():
    assert image_sizes(ModelConfig()) == ImageSizes(518, 392, 224, 224)
    assert image_sizes(ModelConfig(img_size=126)) == ImageSizes(126, 98, 56, 56)


def test_sintel_video_depth_is_also_averaged_over_the_14_published_clips(tmp_path):
    run = run_of('video_depth', tmp_path, tmp_path)
    records = own_records('sintel', {'AbsRel, scale': 0.2}, POSE_SEQUENCES)
    records += own_records('sintel', {'AbsRel, scale': 0.8}, ('bamboo_1',))
    every, published = summarise(run, records)
    assert list(every.rows) == [own_row(run)] and every.rows[own_row(run)] == [pytest.approx(0.24)]
    assert published.rows[own_row(run)][0] == pytest.approx(0.2)
    assert published.rows['STream3R with STAC'][0] == 0.259


@pytest.mark.parametrize(
    'changed, reason',
    [
        ({}, ''),
        ({'clips': None}, 'does not list its clips'),
        ({'clips': {'a': 1000, 'b': 1000}}, '2 clips are not the 1 judged here'),
        ({'clips': {'a': 999}}, 'its clip a has 999 frames, here 1000'),
        ({'long_side': 512}, 'a long side of 512, here 518'),
        ({'long_side': None}, 'does not tell the size of its images'),
        ({'frames': 'every 2nd'}, 'frames are every 2nd, here every 5th'),
        ({'icp': 'point_to_plane'}, 'registration is point_to_plane, here point_to_point'),
    ],
)
def test_other_clips_frames_sizes_or_registration_put_published_rows_apart(
    tmp_path, monkeypatch, changed, reason
):
    same = {'clips': {'a': 1000}, 'frames': 'every 5th', 'icp': 'point_to_point'}
    same |= {'long_side': 518}
    name, source = 'long_recon/7scenes', 'somebody'
    entry = ReferenceTable(name, 'Title', source, ['NC mean'], {'row': [1]}, **same | changed)
    monkeypatch.setattr(summary, 'reference_tables', lambda: [entry])
    run = run_of('long_recon', tmp_path, tmp_path)
    records = own_records('7scenes_test', {'NC mean': 0.6})
    (own,) = summarise(run, records)
    apart = other_protocols(run, records)
    assert ('row' in own.rows) == (not reason) and len(apart) == bool(reason)
    assert not reason or any(reason in remark for remark in apart[0].remarks)


def test_every_published_table_states_its_source_and_has_full_rows():
    tables = reference_tables()
    selections = [c for s in SUITES.values() for part in s.parts for c in part.selections]
    protocols = {chosen.protocol for chosen in selections if chosen.protocol}
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
    assert {f[0] for f in content['failures']} == {'tum_90', 'sintel'}
    page = (tmp_path / 'out/camera_pose/summary.html').read_text()
    _, _, apart = page.partition('Other protocols')
    assert 'STream3R, full cache' in apart and 'Failed or missing' in page
    text = as_text(tables[0])
    assert text.splitlines()[0].startswith('sintel') and own_row(run) in text
