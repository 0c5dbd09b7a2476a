"""Comparison: same input, several variants, one table and one plot."""

import json

import pytest
from oracle import CONFIG, Oracle, room_clip

from stream3r_core.config import CoreConfig, from_dict, to_dict
from stream3r_core.errors import DataError
from stream3r_core.evaluation.compare import compare
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.pipelines import make_pipeline
from stream3r_core.evaluation.run import evaluate
from stream3r_core.pipeline import load_configured_model

QUICK = EvaluationConfig(icp='none', pictures=False)


def variant(mode):
    config = from_dict(CoreConfig, {**to_dict(CONFIG), 'session': {'mode': mode}})
    return make_pipeline(load_configured_model(config.model), config)


def test_cache_modes_stand_in_one_table_and_one_plot(tmp_path):
    clip = room_clip(num_frames=9)
    reports = {
        mode: evaluate(clip, variant(mode), tmp_path / mode, QUICK)
        for mode in ('causal', 'window', 'stac')
    }
    rows = compare(reports, tmp_path)
    assert rows['window']['cache'] < rows['causal']['cache']  # 6 of 9 frames
    assert rows['causal']['map accuracy'] is not None  # icp none needs no Open3D normals
    content = json.loads((tmp_path / 'comparison.json').read_text())
    assert content['options'] == {
        'session.mode': {'causal': 'causal', 'window': 'window', 'stac': 'stac'}
    }
    assert content['variants']['stac'] == rows['stac']
    assert content['columns']['ATE'] == {
        'unit': 'm',
        'alignment': 'Sim(3)',
        'truth': 'truth of room',
    }
    assert content['columns']['depth AbsRel']['alignment'] == 'scale'
    assert content['conditions'] == {name: report.conditions for name, report in reports.items()}
    page = (tmp_path / 'comparison.html').read_text()
    assert page.count('data:image/png') == 1 and 'session.mode' in page
    assert '<th>ATE (m, Sim(3))</th>' in page and '<th>depth AbsRel (scale)</th>' in page
    assert '<tr><th>condition</th><th>causal</th><th>window</th><th>stac</th></tr>' in page


def test_variants_over_other_frames_are_refused(tmp_path):
    clip = room_clip(num_frames=4)
    whole = evaluate(clip, Oracle(clip), tmp_path / 'a', QUICK)
    half = evaluate(clip.every(2), Oracle(clip), tmp_path / 'b', QUICK)
    with pytest.raises(DataError, match='same frames'):
        compare({'whole': whole, 'half': half}, tmp_path)
    with pytest.raises(DataError, match='two or more'):
        compare({'whole': whole}, tmp_path)
