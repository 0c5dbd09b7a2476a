"""``stream3r benchmark`` prints its tables and writes them, messages on a real graph included."""

import json

import pytest
import torch

from stream3r_core.benchmark.stages import STAGES
from stream3r_core.pipeline import resolve_dtype
from stream3r_ros.cli import main

pytestmark = pytest.mark.ros


def test_the_report_holds_frames_stages_floor_and_conditions(tmp_path, capsys):
    file = tmp_path / 'benchmark.json'
    command = (
        'benchmark --modes window --size 40x32 --frames 2 1 --repeats 2 --warmup 1 --threads 1 '
        f'--peak-tflops 0.5 --set model.weights=random --output {file}'
    )
    assert main(command.split()) == 0
    report, text = json.loads(file.read_text()), capsys.readouterr().out
    assert report['plan'] == {
        'height': 32, 'width': 40, 'frames': [1, 2], 'repeats': 2, 'warmup': 1,
    }  # fmt: skip
    conditions = report['conditions']
    dtype = str(resolve_dtype('auto', torch.device('cpu'))).removeprefix('torch.')
    assert conditions['threads'] == 1 and conditions['dtype'] == dtype
    assert conditions['weights']['source'] == 'random' and 'weights are random' in text
    assert {'code', 'device', 'versions', 'date'} <= set(conditions)
    floor, (first, second) = report['floor'], report['modes']['window']['frames']['rows']
    assert floor['flop_per_s'] == 5e11 and not floor['is_measured']
    assert first['floor_s'] == pytest.approx(floor['first_frame_flop'] / 5e11)
    assert first['floor_s'] < second['floor_s'] and second['frame'] == 2
    assert report['published']['window']['1']['p50_s'] == 0.146
    backends = report['modes']['window']['attention']
    assert sum(said.startswith('runs') for said in backends.values()) == 1
    assert all(f'{name}: {why}' in text for name, why in backends.items())
    for row in report['modes']['window']['stages']:
        assert set(row['stages']) == set(STAGES)  # publish: messages were built and sent
        assert all(stage in text for stage in STAGES)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--size 41x32', 'multiples of the patch size 8'),
        ('--size big', 'expected WIDTHxHEIGHT'),
        ('--frames 0', 'counted from 1'),
        ('--threads -1', 'must not be negative'),
        ('--chunks 4 9', 'sizes from 1 to 8'),
        ('--set model.preset=huge', 'expected one of tiny'),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, capsys):
    assert main(['benchmark', *arguments.split()]) == 1
    captured = capsys.readouterr().err
    assert message in captured and captured.count('\n') == 1
