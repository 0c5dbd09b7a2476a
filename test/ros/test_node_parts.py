"""The small parts of the node, without a graph: figures, frames, rates, the record of poses."""

import json
import logging
import shutil

import numpy as np
import pytest
import yaml

from stream3r_core.checkpoints import WeightsInfo
from stream3r_core.config import flatten, from_dict
from stream3r_core.errors import ConfigError, InputError, OutputError
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import MapCloud, load_ply
from stream3r_ros.config import NodeConfig, SaveMapConfig
from stream3r_ros.diagnostics import (
    RATE_WINDOW_S,
    FrameStatistics,
    NodeStatus,
    ReconstructionFigures,
    diagnostic_array,
)
from stream3r_ros.environment import prepare_environment
from stream3r_ros.logging_bridge import MAX_KINDS, RosLogHandler, Throttled
from stream3r_ros.options import read_options
from stream3r_ros.outputs import TOPICS
from stream3r_ros.parameters import nest
from stream3r_ros.provenance import Provenance
from stream3r_ros.publishers import RateLimit
from stream3r_ros.recorder import PoseRecorder, Snapshot, save_snapshot
from stream3r_ros.resources import resource
from stream3r_ros.tf import camera_frame, check_frames

pytestmark = pytest.mark.ros


class HandClock:
    """A clock that stands until it is set."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run_stream(statistics, clock, count, period_s, latency_s):
    for _ in range(count):
        arrival = statistics.received()
        clock.now += latency_s
        statistics.processed(arrival)
        clock.now += period_s - latency_s


def test_rates_and_latency_are_those_of_the_stream():
    clock = HandClock()
    statistics = FrameStatistics(window=1000, clock=clock)
    run_stream(statistics, clock, count=100, period_s=0.1, latency_s=0.03)
    figures = statistics.figures()
    assert (figures.num_received, figures.num_processed) == (100, 100)
    assert figures.rate_in_hz == pytest.approx(10, rel=0.05)
    assert figures.rate_out_hz == pytest.approx(10, rel=0.05)
    assert figures.latency_p50_ms == pytest.approx(30)
    assert figures.latency_p95_ms == pytest.approx(30)
    clock.now += RATE_WINDOW_S
    assert statistics.figures().rate_in_hz == 0


def test_latency_is_over_recent_frames_only():
    clock = HandClock()
    statistics = FrameStatistics(window=10, clock=clock)
    run_stream(statistics, clock, count=50, period_s=1.0, latency_s=0.9)
    run_stream(statistics, clock, count=10, period_s=0.1, latency_s=0.01)
    assert statistics.figures().latency_p95_ms == pytest.approx(10)
    assert statistics.figures().num_processed == 60


def status(**fields):
    statistics = FrameStatistics(window=10, clock=HandClock())
    return NodeStatus(state='active', frames=statistics.figures(), **fields)


def test_the_status_reads_as_a_sentence_and_as_values():
    made = ReconstructionFigures(cache_tokens=660, cache_bytes=4_000_000, map_points=7)
    good = status(
        drops={'superseded': 2, 'rejected': 1},
        losses={'transport': 1, 'unread': 3},
        reconstruction=made,
    )
    assert good.level == b'\x00'
    assert '3 dropped (1 rejected, 2 superseded)' in good.sentence()
    assert '4 lost on the way (1 transport, 3 unread)' in good.sentence()
    assert good.values()['images_lost'] == '4' and good.values()['images_lost.unread'] == '3'
    assert 'map 7 points' in good.sentence() and '660 tokens, 4.0 MB' in good.sentence()
    values = good.values()
    assert values['images_dropped'] == '3' and values['images_dropped.superseded'] == '2'
    assert values['cache_bytes'] == '4000000' and 'gpu_bytes' not in values
    assert status(problem='no images on /image').level == b'\x01'
    assert NodeStatus('failed', good.frames).level == b'\x02'


def test_the_diagnostic_message_carries_sentence_and_values():
    from builtin_interfaces.msg import Time

    given = status(problem='no images')
    message = diagnostic_array(given, '/stream3r', '/image', Time(sec=3))
    (entry,) = message.status
    assert message.header.stamp.sec == 3
    assert entry.message == given.sentence() and entry.message.endswith('no images')
    assert {pair.key: pair.value for pair in entry.values} == given.values()


@pytest.mark.parametrize('rate_hz', [1, 7, 10, 29.9])
def test_a_rate_limit_keeps_its_rate_over_time(rate_hz):
    limit = RateLimit()
    stamps = np.arange(0, 100 * 10**9, 33_333_333)  # 100 s at 30 Hz
    passed = [stamp for stamp in stamps.tolist() if limit.is_due(stamp, rate_hz)]
    assert passed[0] == 0
    assert len(passed) == pytest.approx(100 * rate_hz, rel=0.01, abs=2)


def test_a_rate_limit_has_no_burst_after_a_pause():
    limit = RateLimit()
    assert limit.is_due(0, 1.0)
    assert limit.is_due(10**11, 1.0) and not limit.is_due(10**11 + 10**8, 1.0)
    assert all(RateLimit().is_due(stamp, 0) for stamp in range(5))


def pose(index):
    T = np.eye(4)
    T[:3, 3] = index, 0.5 * index, -index
    return T


def test_the_record_of_poses_keeps_the_latest_and_counts_the_rest():
    recorder = PoseRecorder(max_poses=4)
    with pytest.raises(InputError, match='no image'):
        recorder.trajectory()
    for index in range(10):
        recorder.add(100 + index, pose(index))
    trajectory = recorder.trajectory()
    assert trajectory.stamps_ns.tolist() == [106, 107, 108, 109]
    np.testing.assert_array_equal(trajectory.T_world_camera, [pose(i) for i in range(6, 10)])
    assert (len(recorder), recorder.num_forgotten) == (4, 6)
    recorder.clear()
    recorder.add(5, pose(1))
    assert recorder.trajectory().stamps_ns.tolist() == [5] and recorder.num_forgotten == 0


def snapshot():
    recorder = PoseRecorder(max_poses=4)
    recorder.add(1_700_000_000_123_456_789, pose(2))
    points = np.arange(9, dtype=np.float32).reshape(3, 3)
    cloud = MapCloud(points, np.full((3, 3), 7, np.uint8), np.ones(3, np.float32))
    weights = WeightsInfo('shipped:tiny', 'tiny.safetensors', 'abc', 2, 3)
    made_with = Provenance(weights, NodeConfig(map_frame='kitchen'))
    return Snapshot(recorder.trajectory(), cloud, recorder.num_forgotten, made_with)


def test_a_snapshot_is_written_and_reads_back(tmp_path):
    config = SaveMapConfig(directory=str(tmp_path / 'a' / 'b'))
    map_file, trajectory_file, made_with = save_snapshot(snapshot(), config)
    np.testing.assert_array_equal(load_ply(map_file).points_xyz, snapshot().cloud.points_xyz)
    trajectory = read_trajectory(trajectory_file)
    assert trajectory.stamps_ns.tolist() == [1_700_000_000_123_456_789]
    np.testing.assert_array_equal(trajectory.T_world_camera, [pose(2)])
    said = json.loads(made_with.read_text())
    assert (made_with.name, said['weights']['sha256']) == ('map.json', 'abc')
    assert from_dict(NodeConfig, said['config']) == NodeConfig(map_frame='kitchen')


def test_a_snapshot_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match='file'):
        save_snapshot(snapshot(), SaveMapConfig(directory=str(tmp_path / 'file')))


def test_names_and_formats_of_the_files_are_options(tmp_path):
    config = SaveMapConfig(str(tmp_path), 'kitchen-2', 'walk_1.a', ply=False, pcd=True)
    paths = save_snapshot(snapshot(), config)
    names = ('kitchen-2.pcd', 'walk_1.a.tum', 'kitchen-2.json')
    assert paths == [tmp_path / name for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert b'POINTS 3' in paths[0].read_bytes()


@pytest.mark.parametrize('name', ['', '.', '..', '.hidden', '../map', 'a/b', '/tmp/map', 'a\0b'])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    for fields in ({'map_name': name}, {'trajectory_name': name}):
        with pytest.raises(ConfigError, match='expected a file name'):
            save_snapshot(snapshot(), SaveMapConfig(directory=str(tmp_path / 'in'), **fields))
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_folder_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('untouched')
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'map.ply').symlink_to(victim)
    save_snapshot(snapshot(), SaveMapConfig(directory=str(tmp_path / 'in')))
    assert victim.read_text() == 'untouched'


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
    with pytest.raises(OutputError, match='is full'):
        save_snapshot(snapshot(), SaveMapConfig(directory=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_nothing_to_write_is_refused(tmp_path):
    config = SaveMapConfig(directory=str(tmp_path), ply=False, tum=False)
    with pytest.raises(ConfigError, match='switched off'):
        save_snapshot(snapshot(), config)


def test_the_frame_of_an_image_is_its_own_unless_configured():
    assert camera_frame('cam', NodeConfig()) == 'cam'
    assert camera_frame('cam', NodeConfig(camera_frame='mine')) == 'mine'
    assert camera_frame('', NodeConfig(camera_frame='mine')) == 'mine'


@pytest.mark.parametrize('frame_id', ['', '/cam', 'map'])
def test_a_frame_that_tf2_cannot_hang_below_the_map_is_refused(frame_id):
    with pytest.raises(InputError, match='camera_frame'):
        camera_frame(frame_id, NodeConfig())


@pytest.mark.parametrize(
    'frames',
    [{'map_frame': ''}, {'map_frame': '/map'}, {'camera_frame': '/c'}, {'camera_frame': 'map'}],
)
def test_frames_that_cannot_be_are_refused_at_the_start(frames):
    with pytest.raises(ConfigError, match='_frame'):
        check_frames(NodeConfig(**frames))


def test_a_saved_map_is_not_laid_by_the_attitude_of_another_day():
    config = nest({'backend.load': 'home.safetensors', 'map_orientation': 'level'})
    check_frames(from_dict(NodeConfig, config))
    with pytest.raises(ConfigError, match="set map_orientation to 'camera'"):
        check_frames(from_dict(NodeConfig, {**config, 'odom_frame': 'odom'}))


def test_the_shipped_parameter_file_states_the_defaults_and_all_options_of_the_node():
    text = resource('config/reconstruct.yaml').read_text()
    stated = flatten_mapping(read_options(resource('config/reconstruct.yaml')))
    defaults = flatten(NodeConfig())
    assert {name: defaults[name] for name in stated} == stated
    elsewhere = {name.split('.')[0] for name in set(defaults) - set(stated)}
    assert elsewhere == {'cache', 'cache_paper', 'backend'}
    header = text.partition('/**')[0]
    assert all(f'{tree}.*' in header for tree in elsewhere), 'the header says what is missing'


def flatten_mapping(values, prefix=''):
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten_mapping(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


@pytest.mark.parametrize('name', ['window', 'causal'])
def test_the_variants_are_a_few_valid_options(name):
    values = read_options(resource(f'config/{name}.yaml'))
    assert values['session']['mode'] == name
    assert len(flatten_mapping(values)) <= 5
    assert nest(flatten_mapping(values)) == values


def test_rviz_shows_topics_that_exist_with_a_quality_of_service_that_fits():
    document = yaml.safe_load(resource('config/reconstruct.rviz').read_text())
    displays = {d['Name']: d for d in document['Visualization Manager']['Displays']}
    shown = {d['Topic']['Value']: d['Topic'] for d in displays.values() if 'Topic' in d}
    camera = shown.pop('/camera/image_raw')
    assert camera['Reliability Policy'] == 'Best Effort'
    for name, topic in shown.items():
        qos = TOPICS[name.replace('/stream3r', '~')].qos
        durability = 'Transient Local' if qos.latched else 'Volatile'
        assert (topic['Durability Policy'], topic['Reliability Policy']) == (
            durability,
            'Reliable',
        )
    assert {'/stream3r/map', '/stream3r/cloud', '/stream3r/path', '/stream3r/depth/image'} <= set(
        shown
    )
    assert displays['TF']['Enabled']
    assert (
        document['Visualization Manager']['Global Options']['Fixed Frame']
        == NodeConfig().map_frame
    )


def test_waiting_threads_sleep_unless_the_user_wants_them_to_spin():
    fresh, chosen = {}, {'OMP_WAIT_POLICY': 'ACTIVE'}
    for environ in (fresh, chosen):
        prepare_environment(environ)
    assert (fresh['OMP_WAIT_POLICY'], chosen['OMP_WAIT_POLICY']) == ('PASSIVE', 'ACTIVE')


class Logger:
    """Notes the severity and the text of each call."""

    def __init__(self):
        self.lines = []

    def __getattr__(self, severity):
        return lambda text: self.lines.append((severity, text))


class Context:
    """A context that is up or down."""

    def __init__(self, is_up):
        self.ok = lambda: is_up


def test_python_logging_reaches_the_ros_logger_while_the_context_is_up():
    logger = Logger()
    log = logging.getLogger('test_node_parts')
    for is_up in (True, False):
        handler = RosLogHandler(logger, Context(is_up))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        for level in (10, 20, 30, 40, 50):
            log.log(level, 'level %d', level)
        log.removeHandler(handler)
    names = ('debug', 'info', 'warning', 'error', 'fatal')
    assert logger.lines == [(name, f'level {10 * (i + 1)}') for i, name in enumerate(names)]


def test_each_kind_of_warning_is_said_once_in_a_while_in_bounded_memory():
    said, now = [], [0.0]
    warn = Throttled(said.append, quiet_s=5.0, clock=lambda: now[0])
    for number in range(3):
        warn(f"image {number} of 'camera{number}' is {number}.5 s late")
        warn(f'the value is {float("nan") if number else 1.0}')
    assert said == ["image 0 of 'camera0' is 0.5 s late", 'the value is 1.0']
    now[0] = 5.0
    warn('the value is inf')
    assert said[-1] == 'the value is inf'
    for number in range(10 * MAX_KINDS):
        warn('x' * number)
    assert len(warn._said) == MAX_KINDS
