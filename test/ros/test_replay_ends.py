"""Whatever ends a replay, it says why and leaves whole files of what came before."""

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from recordings import (
    CAMERA_FRAME,
    MESSAGES,
    SMALL,
    START_NS,
    picture,
    recorded,
    replay,
    rgb,
    stamp,
    write_images,
    write_photos,
)

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import load_ply
from stream3r_ros.bag import BagWriter
from stream3r_ros.cli import main

ROOT = Path(__file__).resolve().parents[2]
NUM = 6
STAMPS = [stamp(index) for index in range(NUM)]


def test_a_broken_image_is_refused_by_name_and_the_rest_comes_out(tmp_path, capsys):
    with BagWriter(tmp_path / 'bag') as bag:
        for index in range(NUM):
            message = rgb(index)
            if index == 2:
                message.data = message.data[:-7]
            if index == 4:
                bag.write_raw('/camera/image_raw', 'sensor_msgs/msg/Image', b'\0\1\0\0?', stamp(4))
            else:
                bag.write('/camera/image_raw', message, stamp(index))
    summary = replay(tmp_path / 'out', tmp_path / 'bag')
    assert (summary['images_in'], summary['images_out']) == (NUM, NUM - 2)
    short, damaged = summary['refused']
    assert 'expected 14400 bytes, got 14393' in short and 'cannot be deserialised' in damaged
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == [STAMPS[i] for i in (0, 1, 3, 5)]
    assert 'image 2 is refused' in ''.join(capsys.readouterr())


def test_images_of_another_size_and_older_ones_are_refused(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        for order, index in enumerate((0, 1, 3, 2, 3, 4)):
            bag.write('/image', rgb(index), START_NS + order)
        tall = MESSAGES.rgb_image(picture(5)[:, :40], stamp(5), CAMERA_FRAME)
        bag.write('/image', tall, stamp(5))
    summary = replay(tmp_path / 'out', tmp_path / 'bag')
    assert (summary['images_in'], summary['images_out']) == (7, 4)
    late, same, size = summary['refused']
    assert (
        'is 0.033 s older' in late
        and 'the stamp of the one before' in same
        and 'this stream has' in size
    )


def test_a_jump_back_in_time_ends_the_replay_with_what_came_before(tmp_path, capsys):
    with BagWriter(tmp_path / 'bag') as bag:
        for order, index in enumerate((100, 101, 102, 0, 1)):
            message = MESSAGES.rgb_image(picture(order), stamp(index), CAMERA_FRAME)
            bag.write('/image', message, START_NS + order)
    summary = replay(tmp_path / 'out', tmp_path / 'bag', code=1)
    assert summary['images_out'] == 3 and 'time jumps back by 3.400 s' in summary['failure']
    assert 'error: time jumps back' in capsys.readouterr().err
    assert len(recorded(tmp_path / 'out')['/tf']) == 3


def test_a_bag_that_breaks_midway_leaves_what_came_before(tmp_path, capsys):
    large = cv2.resize(picture(0), (800, 600))  # each fills a chunk of its own
    with BagWriter(tmp_path / 'bag') as bag:
        for index in range(4):
            bag.write('/image', MESSAGES.rgb_image(large, stamp(index), 'camera'), stamp(index))
    storage = tmp_path / 'bag' / 'bag.mcap'
    data = storage.read_bytes()
    start = data.index(b'\1\0' + bytes(4) + stamp(3).to_bytes(8, 'little') * 2)
    storage.write_bytes(data[: start - 8] + b'\xff' * 8 + data[start:])  # the record's length
    summary = replay(tmp_path / 'out', tmp_path / 'bag', code=1)
    assert summary['images_out'] == 3 and 'mcap recover' in summary['failure']
    assert len(read_trajectory(tmp_path / 'out' / 'trajectory.tum')) == 3
    assert len(load_ply(tmp_path / 'out' / 'map.ply')) > 0
    assert 'cannot be read as a bag' in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_results_so_far(tmp_path, number):
    images = tmp_path / 'images'
    images.mkdir()
    for index in range(500):
        cv2.imwrite(str(images / f'{index}.png'), picture(index % 60))
    command = [
        sys.executable,
        '-m',
        'stream3r_ros',
        'replay',
        images,
        '--output',
        tmp_path / 'out',
    ]
    with subprocess.Popen([*command, *SMALL], cwd=ROOT, stderr=subprocess.PIPE) as process:
        progress = b''
        while not re.search(rb'[1-9]\d*/500', progress):
            progress += process.stderr.read(1)
        process.send_signal(number)
        process.stderr.read()
        assert process.wait(60) == 130
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    assert summary['interrupted'] and 0 < summary['images_out'] < 500
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert len(trajectory) == summary['images_out'] == len(recorded(tmp_path / 'out')['/tf'])
    assert len(load_ply(tmp_path / 'out' / 'map.ply')) == summary['map_points'] > 0


def test_a_broken_image_file_is_refused_and_the_rest_comes_out(tmp_path):
    photos = write_photos(tmp_path / 'images', ['0.png', '1.png', '2.png'])
    photos[1].write_bytes(photos[1].read_bytes()[:60])
    summary = replay(tmp_path / 'out', tmp_path / 'images')
    assert summary['images_out'] == 2 and 'cannot read the image' in summary['refused'][0]


def fails(capsys, *arguments):
    """Run a command that must fail; return what it says."""
    assert main(['replay', *map(str, arguments)]) == 1
    said = capsys.readouterr().err
    assert 'stream3r: error: ' in said and 'Traceback' not in said
    return said


def test_what_cannot_be_read_says_so_before_anything_is_written(tmp_path, capsys):
    bag = write_images(tmp_path / 'bag')
    (tmp_path / 'text.txt').write_text('no video')
    (tmp_path / 'empty').mkdir()
    out = ('--output', tmp_path / 'out', *SMALL)
    assert 'no such file' in fails(capsys, tmp_path / 'nowhere', *out)
    assert 'cannot be opened as a video' in fails(capsys, tmp_path / 'text.txt', *out)
    empty = fails(capsys, tmp_path / 'empty', *out)
    assert 'holds no image' in empty and 'no bag either (metadata.yaml' in empty
    assert 'several inputs must all be image files' in fails(capsys, bag, tmp_path / 'empty', *out)
    assert "no topic '/none'" in fails(capsys, bag, '--image-topic', '/none', *out)
    assert 'are for bags' in fails(capsys, tmp_path / 'empty', '--camera-info', '/x', *out)
    assert "no topic '/x'" in fails(capsys, bag, '--camera-info', '/x', *out)
    assert "no topic '/y'" in fails(capsys, bag, '--ground-truth', '/y', *out)
    assert 'must be positive' in fails(capsys, tmp_path / 'empty', '--rate', '0', *out)
    assert not (tmp_path / 'out').exists()


def test_earlier_results_are_only_replaced_when_asked(tmp_path, capsys):
    bag = write_images(tmp_path / 'bag')
    replay(tmp_path / 'out', bag)
    before = (tmp_path / 'out' / 'summary.json').read_bytes()
    line = fails(capsys, bag, '--output', tmp_path / 'out', *SMALL)
    assert 'holds trajectory.tum already' in line
    assert (tmp_path / 'out' / 'summary.json').read_bytes() == before
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    replay(tmp_path / 'out', bag, '--overwrite')
    assert (tmp_path / 'out' / 'notes.txt').read_text() == 'mine'


def test_an_unwritable_output_says_so(tmp_path, capsys):
    bag = write_images(tmp_path / 'bag')
    (tmp_path / 'file').touch()
    line = fails(capsys, bag, '--output', tmp_path / 'file' / 'out', *SMALL)
    assert 'cannot write results into' in line


def test_an_input_is_never_replaced_by_its_results(tmp_path, capsys):
    bag = write_images(tmp_path / 'out' / 'bag')
    said = fails(capsys, bag, '--output', tmp_path / 'out', '--overwrite', *SMALL)
    assert 'results would replace the input' in said and (bag / 'metadata.yaml').exists()


def test_a_full_disk_ends_the_replay_and_keeps_the_poses_so_far(tmp_path):
    bag = write_images(tmp_path / 'bag', indices=range(60))

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))

    command = [sys.executable, '-m', 'stream3r_ros', 'replay', bag, '--output', tmp_path / 'out']
    run = subprocess.run(
        [*command, *SMALL], cwd=ROOT, preexec_fn=limit_file_size, capture_output=True, text=True
    )
    assert run.returncode == 1 and 'Traceback' not in run.stderr
    assert 'error: cannot write the bag' in run.stderr
    assert 0 < len(read_trajectory(tmp_path / 'out' / 'trajectory.tum')) < 60


def test_a_bag_without_a_usable_image_fails_and_says_why(tmp_path, capsys):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.write('/image', MESSAGES.rgb_image(picture(0), stamp(0), ''), stamp(0))
    assert 'none of 1 images could be used' in fails(
        capsys, tmp_path / 'bag', '--output', tmp_path / 'out', *SMALL
    )
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    assert 'set the parameter camera_frame' in summary['refused'][0]
    args = ('--overwrite', '--set', 'camera_frame=cam')
    assert replay(tmp_path / 'out', tmp_path / 'bag', *args)['images_out'] == 1


def test_images_without_a_stamp_are_refused_as_the_node_does(tmp_path, capsys):
    def unstamped(index):
        image = rgb(index)
        image.header.stamp.sec = image.header.stamp.nanosec = 0
        return image

    with BagWriter(tmp_path / 'bag') as bag:
        for index in range(3):
            message = unstamped(index) if index == 0 else rgb(index)
            bag.write('/camera/image_raw', message, stamp(index))
    summary = replay(tmp_path / 'out', tmp_path / 'bag')
    assert (summary['images_out'], summary['images_refused']) == (2, 1)
    assert 'the image has no stamp (0 ns)' in summary['refused'][0]
    made_with = json.loads((tmp_path / 'out' / 'map.json').read_text())
    assert made_with['weights'] == summary['weights']
    assert made_with['config']['image']['long_side'] == 56
