"""The demo runs the real system: its live result is the replay's, and it always cleans up."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recordings import SMALL, picture, recorded, stamp, true_tf, write_images

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_core.synthetic import render_sequence
from stream3r_ros.bag import BagReader
from stream3r_ros.cli import main
from stream3r_ros.conversions import stamp_ns
from stream3r_ros.picture import draw_results
from stream3r_ros.replay import INTERRUPTED
from stream3r_ros.sample import CAMERA_FRAME, CAMERA_INFO, TRUE_POSE, write_sample, write_sequence
from stream3r_ros.sources import BagSource

pytestmark = pytest.mark.ros

ROOT = Path(__file__).resolve().parents[2]
NUM = 6


@pytest.fixture
def demo(tmp_path):
    """Start ``stream3r demo``; whatever still runs at the end is killed and reaped."""
    children = []

    def start(*arguments):
        command = ['-m', 'stream3r_ros', 'demo', '--output', 'out', *map(str, arguments)]
        child = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate(timeout=300)


def finish(child):
    output, _ = child.communicate(timeout=300)
    return child.returncode, output


def processes_with(text):
    """Return the command lines of running processes that mention ``text``."""
    lines = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            lines.append(path.read_bytes().replace(b'\0', b' ').decode(errors='replace'))
        except OSError:  # it has ended meanwhile
            continue
    return [line for line in lines if text in line and '-m stream3r_ros' in line]


def test_the_live_result_is_that_of_a_replay_and_knows_nothing_of_the_truth(demo, tmp_path):
    write_images(tmp_path / 'told', range(NUM), extra={'/tf': true_tf})
    write_images(tmp_path / 'untold', range(NUM))
    code, output = finish(demo('--input', 'told', *SMALL))
    assert code == 0, output
    assert 'untrained random weights' in output
    assert re.search(r'evaluation only: ATE \d', output)
    arguments = [str(tmp_path / 'untold'), '--output', str(tmp_path / 'replayed')]
    assert main(['replay', *arguments, *SMALL]) == 0

    live, replayed = (
        read_trajectory(tmp_path / f / 'trajectory.tum') for f in ('out', 'replayed')
    )
    assert live.stamps_ns.tolist() == [stamp(index) for index in range(NUM)]
    np.testing.assert_allclose(live.T_world_camera, replayed.T_world_camera, atol=1e-5)
    clouds = [load_ply(tmp_path / f / 'map.ply') for f in ('out', 'replayed')]
    assert len(clouds[0]) == pytest.approx(len(clouds[1]), rel=0.01)
    by_demo, by_replay = (recorded(tmp_path / folder) for folder in ('out', 'replayed'))
    assert {t: len(m) for t, m in by_demo.items()} == {t: len(m) for t, m in by_replay.items()}
    edges = [edge for message in by_demo['/tf'] for edge in message.transforms]
    assert [stamp_ns(edge) for edge in edges] == live.stamps_ns.tolist()
    translation = [[getattr(edge.transform.translation, axis) for axis in 'xyz'] for edge in edges]
    np.testing.assert_allclose(translation, live.positions_m, atol=1e-6)
    assert by_demo['/stream3r/map'][0].width == len(clouds[0])
    assert Image.open(tmp_path / 'out' / 'picture.png').size[0] > 1000
    assert not processes_with(str(tmp_path))


def test_an_interrupt_keeps_what_is_done_and_leaves_no_process(demo, tmp_path):
    write_images(tmp_path / 'bag', [0, 1, 10**6])  # hours between the last two
    child = demo('--input', 'bag', *SMALL)
    output = ''
    while '2/3' not in output:
        read = child.stdout.read(1)
        assert read, output
        output += read
    child.send_signal(signal.SIGINT)
    code, rest = finish(child)
    assert code == INTERRUPTED, output + rest
    assert len(read_trajectory(tmp_path / 'out' / 'trajectory.tum')) == 2
    assert len(load_ply(tmp_path / 'out' / 'map.ply')) > 0
    assert len(recorded(tmp_path / 'out')['/tf']) == 2
    assert (tmp_path / 'out' / 'picture.png').is_file()
    assert not processes_with(str(tmp_path))


def test_a_node_that_cannot_start_is_one_clear_error(demo, tmp_path):
    write_images(tmp_path / 'bag', range(2))
    code, output = finish(demo('--input', 'bag', '--weights', 'missing.safetensors'))
    assert code == 1
    assert 'stream3r: error: the node has ended' in output
    assert 'missing.safetensors' in output
    assert 'Traceback' not in output
    assert not processes_with(str(tmp_path))


def test_a_video_or_folder_goes_over_the_live_graph_too(demo, tmp_path):
    (tmp_path / 'photos').mkdir()
    for index in range(2):
        Image.fromarray(picture(index)).save(tmp_path / 'photos' / f'{index}.png')
    code, output = finish(demo('--input', 'photos', '--rate', '5', *SMALL))
    assert code == 0, output
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == [1_000_000_000, 1_200_000_000]


def test_photos_are_reconstructed_together_without_a_graph(tmp_path, capsys):
    names = [tmp_path / f'{index}.png' for index in range(3)]
    for index, name in enumerate(names):
        Image.fromarray(picture(index)).save(name)
    out = str(tmp_path / 'out')
    assert main(['demo', '--input', *map(str, names), '--output', out, *SMALL]) == 0
    assert len(read_trajectory(tmp_path / 'out' / 'trajectory.tum')) == 3
    assert (tmp_path / 'out' / 'picture.png').is_file()
    assert 'untrained' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--input', '{}/none'], 'no such'),
        (['--input', '{}/bag', '--image-topic', '/depth'], "no topic '/depth'"),
        (['--input', '{}/bag', '--set', 'session.windows=3'], "unknown option 'windows'"),
        (['--input', '{}/bag', '--output', '{}/bag/metadata.yaml/out'], 'cannot write results'),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, arguments, message):
    write_images(tmp_path / 'bag', range(1))
    arguments = [text.format(tmp_path) for text in arguments]
    if '--output' not in arguments:
        arguments += ['--output', str(tmp_path / 'out')]
    assert main(['demo', *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_the_sample_is_a_bag_with_images_intrinsics_and_a_truth_apart(tmp_path):
    write_sample(tmp_path / 'sample', num_frames=2)
    with BagReader(tmp_path / 'sample') as bag:
        frames = [load() for load in BagSource(bag, camera_info_topic='auto')]
        truths = [bag.deserialize(message) for message in bag.messages([TRUE_POSE])]
        assert not {'/tf', '/tf_static'} & {*bag.topics}
    assert [frame.frame_id for frame in frames] == [CAMERA_FRAME] * 2
    assert [frame.stamp_ns for frame in frames] == [stamp_ns(truth) for truth in truths]
    assert frames[0].K[0, 0] > 0 and frames[0].rgb.std() > 10


def test_a_rendered_lens_is_in_the_camera_info_of_its_bag(tmp_path):
    write_sequence(tmp_path / 'bag', render_sequence(0, 1, 24, 32, distortion=(-0.1, 0.02)))
    with BagReader(tmp_path / 'bag') as bag:
        [info] = [bag.deserialize(message) for message in bag.messages([CAMERA_INFO])]
    assert info.distortion_model == 'plumb_bob' and list(info.d) == [-0.1, 0.02, 0, 0, 0]


def test_the_picture_shows_the_map_the_path_and_the_warning(tmp_path):
    """Against a run without points and against no warning: each makes a difference one can see."""
    bag = write_images(tmp_path / 'bag', range(3))
    assert main(['replay', str(bag), '--output', str(tmp_path / 'out'), *SMALL]) == 0
    with BagReader(bag) as reader:
        source = BagSource(reader)
        plain = np.asarray(Image.open(draw_results(tmp_path / 'out', source, 'run')))
        warned = np.asarray(Image.open(draw_results(tmp_path / 'out', source, 'run', 'untrained')))
        path_xyz = read_trajectory(tmp_path / 'out' / 'trajectory.tum').positions_m
        given = {'true_xyz': path_xyz + np.array([0.0, 0.1, 0.0])}
        with_truth = np.asarray(Image.open(draw_results(tmp_path / 'out', source, 'run', **given)))
    colored = np.ptp(plain[..., :3].astype(int), axis=2) > 20
    height, width = colored.shape
    for rows in (slice(0, height // 2), slice(height // 2, height)):
        for columns in (slice(0, width // 2), slice(width // 2, width)):
            assert colored[rows, columns].any()
    changed = (plain != warned).any(axis=2)
    assert changed.any() and not changed[: height // 4].any()
    differs = (plain != with_truth).any(axis=2)
    assert (
        differs[height // 2 :, : width // 2].any() and differs[height // 2 :, width // 2 :].any()
    )
    assert not differs[: height // 4].any()
