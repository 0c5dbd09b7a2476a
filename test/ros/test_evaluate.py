"""stream3r evaluate and compare: truth found in bags and folders, many inputs, suites."""

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from recordings import (
    CAMERA_FRAME,
    MESSAGES,
    SMALL,
    picture,
    recorded,
    rgb,
    stamp,
    true_pose,
    true_tf,
    write_images,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / 'core'))

import dataset_miniatures as miniatures

from stream3r_core.errors import DataError
from stream3r_core.evaluation.report import Skipped, read_report
from stream3r_core.evaluation.trajectory import ate
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_ros import evaluate, evaluation_tasks
from stream3r_ros.bag import BagWriter
from stream3r_ros.calibration import Calibrator
from stream3r_ros.cli import main
from stream3r_ros.clips import bag_clip
from stream3r_ros.conversions import Lens
from stream3r_ros.evaluation_tasks import (
    EvaluateConfig,
    evaluate_task,
    is_done,
    open_clip,
    tasks_from_args,
)
from stream3r_ros.options import config_from_args

K = np.array([[40.0, 0, 39.5], [0, 40.0, 29.5], [0, 0, 1]])
DEPTH_FRAME = 'depth_optical'
QUICK = (*SMALL, '--set', 'evaluation.pictures=false', '--set', 'evaluation.icp=none')
SUITE = ('--suite', 'mono_depth', '--data', '{data}')


def depth_map(index):
    """A slanted wall [60, 80], metres, with a hole."""
    depth = np.full((60, 80), 2.0 + 0.1 * index, np.float32) + np.linspace(0, 1, 80)
    depth[:5, :5] = np.nan
    return depth.astype(np.float32)


def depth_of(frame_id=CAMERA_FRAME, late_ns=0):
    return lambda i: MESSAGES.float_image(depth_map(i), stamp(i) + late_ns, frame_id)


def info_of(frame_id=CAMERA_FRAME):
    return lambda i: MESSAGES.camera_info(K, 60, 80, stamp(i), frame_id)


def static_tf(index):
    T = np.eye(4)
    T[0, 3] = 0.1  # the depth camera sits 10 cm to the right
    return MESSAGES.tf([MESSAGES.transform(T, stamp(index), CAMERA_FRAME, DEPTH_FRAME)])


@pytest.fixture
def bag(tmp_path):
    """A bag with images, intrinsics, aligned depth and the true motion as TF."""
    extra = {
        '/tf': true_tf,
        '/camera/camera_info': info_of(),
        '/depth/image': depth_of(late_ns=4_000_000),
    }
    return write_images(tmp_path / 'bag', extra=extra)


def evaluated(output, *words, arguments=QUICK, code=0):
    words = ['evaluate', *map(str, words), '--output', str(output), *arguments]
    assert main(words) == code
    return output / 'report.json'


def test_a_bag_brings_its_own_truth(bag, tmp_path):
    report = read_report(evaluated(tmp_path / 'out', bag))
    assert report.num_frames == 6 and not report.skipped
    groups = {metric.group for metric in report.metrics}
    assert groups == {'trajectory', 'depth', 'map', 'speed'}
    assert any('/depth/image' in remark for remark in report.remarks)
    assert f'true poses: /tf map -> {CAMERA_FRAME}' in report.remarks
    poses = [metric for metric in report.metrics if metric.group == 'trajectory']
    assert {metric.truth for metric in poses} == {f'/tf map -> {CAMERA_FRAME}'}


def test_robot_odometry_is_no_truth_unless_it_is_named(tmp_path):
    def odometry(index):
        T = true_pose(index)
        return MESSAGES.tf([MESSAGES.transform(T, stamp(index), 'odom', CAMERA_FRAME)])

    bag = write_images(tmp_path / 'bag', extra={'/tf': odometry})
    report = read_report(evaluated(tmp_path / 'a', bag))
    assert report.value('ATE RMSE', 'SE(3)') is None
    assert any('--ground-truth /tf' in remark for remark in report.remarks)
    report = read_report(evaluated(tmp_path / 'b', bag, '--ground-truth', '/tf'))
    name = f'/tf odom -> {CAMERA_FRAME}'
    assert report.value('ATE RMSE', 'SE(3)', name) > 0
    assert f'true poses: {name}' in report.remarks
    assert f'against {name}'.replace('>', '&gt;') in (tmp_path / 'b/report.html').read_text()


def test_depth_and_pose_of_a_bag_reach_the_frame_that_they_belong_to(bag):
    frames = list(bag_clip(bag).frames)
    for index, frame in enumerate(frames):
        assert frame.stamp_ns == stamp(index)
        np.testing.assert_allclose(frame.T_world_camera, true_pose(index), atol=1e-9)
        np.testing.assert_array_equal(frame.load_depth_m(), np.nan_to_num(depth_map(index)))
        np.testing.assert_array_equal(frame.K, K)
    assert [f.stamp_ns for f in frames] == [f.stamp_ns for f in bag_clip(bag).frames]


def test_the_frames_of_a_bag_can_be_read_again(bag):
    clip = bag_clip(bag)
    assert len(list(clip.frames)) == len(list(clip.frames)) == len(clip) == 6


def test_depth_of_another_camera_is_projected_into_that_of_the_images(tmp_path):
    extra = {
        '/tf_static': static_tf,
        '/camera/camera_info': info_of(),
        '/depth/camera_info': info_of(DEPTH_FRAME),
        '/depth/image': depth_of(DEPTH_FRAME),
    }
    clip = bag_clip(write_images(tmp_path / 'bag', extra=extra))
    assert any('projected' in remark for remark in clip.remarks)
    seen = next(iter(clip.frames)).load_depth_m()
    # A point at depth z moves by 40 * 0.1 / z pixels to the right.
    column = 50
    shifted = round(column + 4 / depth_map(0)[30, column])
    assert seen[30, shifted] == pytest.approx(depth_map(0)[30, column], abs=0.03)


def test_depth_that_cannot_be_placed_is_a_remark_and_an_error_when_asked_for(tmp_path):
    extra = {'/depth/image': depth_of('elsewhere')}
    bag = write_images(tmp_path / 'bag', extra=extra)
    clip = bag_clip(bag)
    assert next(iter(clip.frames)).load_depth_m is None
    assert any('/tf_static' in remark for remark in clip.remarks)
    with pytest.raises(DataError, match='elsewhere'):
        bag_clip(bag, depth_topic='/depth/image')
    assert bag_clip(bag, depth_topic='none').remarks == ()


def test_images_and_depth_are_rectified_when_the_intrinsics_count(tmp_path):
    lens = MESSAGES.camera_info(np.array([[70.0, 0, 41], [0, 75, 29], [0, 0, 1]]), 60, 80, 0, 'c')
    lens.d = np.array([-0.25, 0.05, 0.001, 0.0, 0.0])
    extra = {'/camera/camera_info': lambda index: lens, '/depth/image': depth_of()}
    bag = write_images(tmp_path / 'bag', extra=extra)
    frame, as_it_is = (next(iter(bag_clip(bag, rectify=r).frames)) for r in ('auto', 'never'))
    calibrated = Calibrator()(as_it_is.load_image(), lens)
    np.testing.assert_array_equal(frame.load_image(), calibrated.image)
    np.testing.assert_array_equal(frame.K, calibrated.K)
    depth, bent = frame.load_depth_m(), as_it_is.load_depth_m()
    assert (depth != bent).any() and np.isin(depth, bent).all()  # moved, never mixed


def test_an_evaluation_writes_the_bag_of_a_replay(bag, tmp_path):
    evaluated(tmp_path / 'out', bag, '--bag')
    assert main(['replay', str(bag), '--output', str(tmp_path / 'replay'), *SMALL]) == 0
    ours, theirs = ((tmp_path / n / 'bag' / 'bag.mcap').read_bytes() for n in ('out', 'replay'))
    assert ours == theirs


@pytest.mark.parametrize('rectify', ['auto', 'never'])
def test_with_known_intrinsics_both_say_what_distortion_is_left(tmp_path, rectify):
    K, bending = np.array([[70.0, 0, 41], [0, 75, 29], [0, 0, 1]]), (-0.25, 0.05, 0.001, 0.0, 0.0)
    info = MESSAGES.camera_info(K, 60, 80, 0, 'c', Lens('plumb_bob', bending))
    bag = write_images(tmp_path / 'bag', extra={'/camera/camera_info': lambda index: info})
    options = ['--set', f'rectify={rectify}']
    evaluated(
        tmp_path / 'out', bag, '--bag', '--set', 'evaluation.known_intrinsics=true', *options
    )
    replay = ['replay', str(bag), '--camera-info', '--output', str(tmp_path / 'replay')]
    assert main([*replay, *SMALL, *options]) == 0
    ours, theirs = ((tmp_path / n / 'bag' / 'bag.mcap').read_bytes() for n in ('out', 'replay'))
    assert ours == theirs
    said = recorded(tmp_path / 'out')['/stream3r/depth/camera_info'][0]
    assert tuple(said.d) == (bending if rectify == 'never' else (0.0,) * 5)


def test_evaluation_and_replay_give_the_same_trajectory(bag, tmp_path):
    evaluated(tmp_path / 'out', bag)
    assert main(['replay', str(bag), '--output', str(tmp_path / 'replay'), *SMALL]) == 0
    ours, theirs = (
        read_trajectory(tmp_path / name / 'trajectory.tum') for name in ('out', 'replay')
    )
    assert ours.stamps_ns.tolist() == theirs.stamps_ns.tolist()
    assert ate(theirs, ours, 'origin').rmse < 1e-6  # replay may turn the map frame upright


def test_a_video_is_compared_with_a_file_without_being_held_in_memory(tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / 'run.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10, (80, 60)
    )
    lines = []
    for index in range(5):
        writer.write(picture(index)[..., ::-1])
        x, y, z = true_pose(index)[:3, 3]
        lines.append(f'{1 + 0.1 * index:.9f} {x} {y} {z} 0 0 0 1')
    writer.release()
    (tmp_path / 'truth.txt').write_text('\n'.join(lines))
    truth = ('--ground-truth', tmp_path / 'truth.txt')
    report = read_report(evaluated(tmp_path / 'out', tmp_path / 'run.avi', *truth))
    assert report.value('associated poses') == 5
    assert report.source['ground_truth'] == [str(tmp_path / 'truth.txt')]


def test_a_file_and_a_topic_stand_side_by_side_as_truths(bag, tmp_path):
    lines = []
    for index in range(6):
        x, y, z = true_pose(index)[:3, 3]
        lines.append(f'{stamp(index) / 1e9:.9f} {x} {y} {z} 0 0 0 1')
    (tmp_path / 'other.txt').write_text('\n'.join(lines))
    names = ('--ground-truth', '/tf', '--ground-truth', str(tmp_path / 'other.txt'))
    report = read_report(evaluated(tmp_path / 'out', bag, *names))
    judged = {(m.truth, m.alignment) for m in report.metrics if m.name == 'ATE RMSE'}
    truths = {truth for truth, _ in judged}
    assert len(judged) == 4 and 'other.txt' in truths and len(truths) == 2


def test_the_truth_beside_a_folder_may_be_that_of_another_body(tmp_path):
    scene = miniatures.folder(tmp_path / 'data')
    mount = true_pose(2)
    np.savetxt(tmp_path / 'mount.txt', mount)
    body, plain = (
        open_clip(task_of(tmp_path / 'data', tmp_path, *words))[0]
        for words in (['--ground-truth-body', str(tmp_path / 'mount.txt')], [])
    )
    np.testing.assert_allclose(plain.truth.T_world_camera, scene.T_world_camera, atol=1e-6)
    expected = scene.T_world_camera @ mount
    np.testing.assert_allclose(body.truth.T_world_camera, expected, atol=1e-6)
    assert any('moved to the camera' in remark for remark in body.remarks)
    assert any("taken for the camera's own" in remark for remark in plain.remarks)


def test_no_truth_when_none_is_wanted(bag, tmp_path):
    arguments = ('--ground-truth', 'none', '--depth', 'none')
    report = read_report(evaluated(tmp_path / 'out', bag, *arguments))
    assert [s.group for s in report.skipped] == ['trajectory', 'depth', 'map']


def test_a_folder_with_truth_beside_the_images(tmp_path):
    miniatures.folder(tmp_path / 'data')
    report = read_report(evaluated(tmp_path / 'out', tmp_path / 'data'))
    assert {m.group for m in report.metrics} == {'trajectory', 'depth', 'map', 'speed'}


def test_a_published_layout_is_read_by_its_name(tmp_path):
    miniatures.sintel(tmp_path / 'sintel')
    report = read_report(evaluated(tmp_path / 'out', tmp_path / 'sintel', '--dataset', 'sintel'))
    assert report.name == 'alley_2' and report.num_frames == 3


def test_photos_are_reconstructed_together(tmp_path):
    miniatures.folder(tmp_path / 'data')
    photos = sorted((tmp_path / 'data/color').iterdir())
    photos[1].write_bytes(b'')
    more = (*QUICK, '--set', 'evaluation.exports=[colmap]')
    report = read_report(evaluated(tmp_path / 'out', *photos, arguments=more))
    assert report.config['session']['mode'] == 'full' and report.num_frames == 2
    assert report.refused[0].startswith(f'{photos[1].name}: ')
    lines = (tmp_path / 'out/colmap/images.txt').read_text().split('\n')[:4:2]
    assert [line.split()[-1] for line in lines] == [photos[0].name, photos[2].name]


def test_one_broken_input_stops_no_other_and_a_rerun_resumes(bag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation_tasks, 'code_version', lambda: '1')  # no commit in between
    (tmp_path / 'empty').mkdir()
    miniatures.folder(tmp_path / 'data')
    inputs = (bag, tmp_path / 'empty', tmp_path / 'data', '--workers', '0')
    evaluated(tmp_path / 'out', *inputs, code=1)
    printed = capsys.readouterr().out
    assert 'FAILED empty' in printed and '2 of 3 inputs' in printed
    reports = [tmp_path / 'out' / name / 'report.json' for name in ('bag', 'data')]
    before = [path.stat().st_mtime_ns for path in reports]
    evaluated(tmp_path / 'out', *inputs, code=1)
    assert [path.stat().st_mtime_ns for path in reports] == before
    printed = capsys.readouterr().out
    assert 'bag: done before' in printed and 'data: done before' in printed
    os.utime(bag / 'bag.mcap', ns=(0, 0))
    evaluated(tmp_path / 'out', *inputs, code=1)
    changed = [path.stat().st_mtime_ns != then for path, then in zip(reports, before)]
    assert changed == [True, False]


def task_of(bag, tmp_path, *arguments):
    """The task of a command line over one bag."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = [str(bag), '--output', str(tmp_path / 'out'), *QUICK, *arguments]
    args = parser.parse_args(words)
    (task,) = tasks_from_args(args, config_from_args(args, None, EvaluateConfig))
    return dataclasses.replace(task, bag=args.bag)


def test_workers_elsewhere_are_given_absolute_paths(bag, tmp_path, monkeypatch):
    (tmp_path / 'truth.txt').write_text(f'{stamp(0) / 1e9:.9f} 0 0 0 0 0 0 1')
    monkeypatch.chdir(tmp_path)
    task = task_of('bag', Path(), '--ground-truth', 'truth.txt', '--depth', '/depth/image')
    assert task.inputs == (str(bag),) and task.folder == tmp_path / 'out'
    assert task.ground_truth == (str(tmp_path / 'truth.txt'),) and task.depth == '/depth/image'


@pytest.fixture
def done_task(bag, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_tasks, 'code_version', lambda: '1')
    (tmp_path / 'truth.txt').write_text(f'{stamp(0) / 1e9:.9f} 0 0 0 0 0 0 1')
    task = task_of(bag, tmp_path)
    evaluate_task(task)
    return task


def test_what_is_done_is_told_by_all_that_the_numbers_depend_on(
    bag, tmp_path, monkeypatch, done_task
):
    assert is_done(done_task) and is_done(task_of(bag, tmp_path))
    for words in (
        ['--bag'],
        ['--depth', 'none'],
        ['--ground-truth', '/tf'],
        ['--ground-truth', str(tmp_path / 'truth.txt')],
        ['--set', 'camera_frame=other'],  # of the node
        ['--set', 'evaluation.depth_strips=1'],
        ['--set', 'session.window=3'],
    ):
        assert not is_done(task_of(bag, tmp_path, *words)), words
    assert not is_done(dataclasses.replace(done_task, rate_hz=7.0))
    monkeypatch.setattr(evaluation_tasks, 'weights_digest', lambda config: 'other')
    assert not is_done(done_task)
    monkeypatch.undo()
    monkeypatch.setattr(evaluation_tasks, 'code_version', lambda: '2')
    assert not is_done(done_task)


def test_what_a_package_was_missing_for_is_done_again_once_it_is_there(done_task):
    path = done_task.folder / 'report.json'
    report = read_report(path)
    for package, is_there in (('no_such_package', False), ('json', True)):
        report.skipped = [Skipped('map', 'it is missing', package)]
        report.write(path)
        assert is_done(done_task) != is_there


def test_a_suite_prints_its_tables(tmp_path, capsys):
    miniatures.sintel(tmp_path / 'data/sintel')
    names = ('--suite', 'camera_pose', '--data', tmp_path / 'data', '--workers', '0')
    evaluated(tmp_path / 'out', *names, arguments=SMALL)
    printed = capsys.readouterr().out
    assert 'this run' in printed and '1 of 14 clips' in printed
    summary = json.loads((tmp_path / 'out/camera_pose/summary.json').read_text())
    assert summary['config']['session']['mode'] == 'causal'


def test_variants_are_compared(bag, tmp_path, capsys):
    words = ['compare', str(bag), '--output', str(tmp_path / 'out'), *QUICK]
    words += ['--variant', 'one:session.window=1', '--variant', 'three:session.window=3']
    assert main(words) == 0
    content = json.loads((tmp_path / 'out/comparison.json').read_text())
    assert content['options']['session.window'] == {'one': '1', 'three': '3'}
    assert content['variants']['one']['cache'] < content['variants']['three']['cache']
    assert (tmp_path / 'out/one/report.html').exists()
    printed = capsys.readouterr().out
    assert 'comparison.html' in printed and re.search(
        r'three: ATE \S+ m, .*, cache \S+ MiB,', printed
    )


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'give an input'),
        (['--suite', 'mono_depth'], '--data'),
        (['{bag}', '--ground-truth', '/nothing'], 'no topic'),
        (['{bag}', '--ground-truth', '/nothing.txt'], '/nothing.txt is no file'),
        (['{bag}', '--depth', '/camera/image_raw'], 'rgb8 images'),
        (['{bag}', '--image-topic', '/tf'], '/tf'),
        (['{data}', '--ground-truth', 'missing.txt'], 'no file'),
        (['{data}', '--depth', '{data}/color/none'], 'named like the images'),
        (['{data}', '--set', 'evaluation.icp=fast'], 'point_to_point'),
        (['{data}', '--set', 'evaluation.depth_alignments=[affine]'], 'affine'),
        (['{data}/nowhere'], 'no such file'),
        (['{empty}'], 'no image'),
        (['{data}', '--image-topic', '/camera'], '--image-topic is for an input that is a bag'),
        (['{photo}', '--depth', '/nonexistent'], '--depth is for'),
        (['{data}', '--depth', '/nonexistent'], 'named like the images'),
        (['{photo}', '--clip', 'one'], '--clip is for'),
        (['{photo}', '--image-topic', '/camera'], '--image-topic is for'),
        (['{bag}', '--rate', '10'], '--rate is for'),
        (['{data}', '--rate', '0'], 'must be positive'),
        (['{data}', '--dataset', 'folder', '--depth', 'none'], '--depth is for'),
        (['{data}', '--dataset', 'folder', '--rate', '10'], '--rate is for'),
        (['{data}', '--dataset', 'folder', '--image-topic', '/a'], '--image-topic is for'),
        (['{bag}', '--ground-truth', 'none', '--ground-truth', '/tf'], 'no other'),
        (['{data}', '--ground-truth-body', 'body'], 'no file'),
        ([*SUITE, '--ground-truth-body', 'body'], '--ground-truth-body says nothing'),
        (['{bag}', '--data', '{data}'], '--suite'),
        (['{bag}', '--workers', '2'], 'several inputs'),
        (['{bag}', '--ray', 'auto'], 'several inputs'),
        ([*SUITE, '--bag'], '--bag says nothing'),
        ([*SUITE, '--ground-truth', 'none'], '--ground-truth says nothing'),
        ([*SUITE, '--rate', '10'], '--rate says nothing'),
        ([*SUITE, '--depth', 'none'], '--depth says nothing'),
        ([*SUITE, '--clip', 'one'], '--clip says nothing'),
        ([*SUITE, '--dataset', 'tum'], '--dataset says nothing'),
        ([*SUITE, '--image-topic', '/a'], '--image-topic says nothing'),
        ([*SUITE, '--set', 'evaluation.exports=[glb]'], 'evaluation.exports says nothing'),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line_and_leaves_nothing(
    bag, tmp_path, capsys, arguments, message
):
    miniatures.folder(tmp_path / 'data')
    (tmp_path / 'empty').mkdir()
    photo = next((tmp_path / 'data/color').iterdir())
    named = {'bag': bag, 'data': tmp_path / 'data', 'empty': tmp_path / 'empty', 'photo': photo}
    words = [a.format(**named) for a in arguments]
    code = main(['evaluate', *QUICK, '--output', str(tmp_path / 'out'), *words])
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith('stream3r: error:')]
    assert code == 1 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / 'out').exists()


def test_a_run_without_a_usable_image_leaves_nothing(tmp_path):
    odd = rgb(0)
    odd.encoding = 'no_such_encoding'
    with BagWriter(tmp_path / 'bag') as bag:
        bag.write('/camera/image_raw', odd, stamp(0))
    for words in ([], ['--bag']):
        evaluated(tmp_path / 'out', tmp_path / 'bag', *words, code=1)
        assert not (tmp_path / 'out').exists()


def test_the_rate_of_a_folder_is_that_of_its_images(tmp_path):
    miniatures.folder(tmp_path / 'data')
    for path in sorted((tmp_path / 'data').glob('*.txt')):
        path.unlink()
    evaluated(tmp_path / 'out', tmp_path / 'data', '--rate', '4', '--depth', 'none')
    stamps_ns = read_trajectory(tmp_path / 'out/trajectory.tum').stamps_ns
    assert set(np.diff(stamps_ns)) == {250_000_000}


def test_earlier_results_are_not_replaced_unasked(bag, tmp_path, capsys):
    evaluated(tmp_path / 'out', bag)
    evaluated(tmp_path / 'out', bag, code=1)
    assert '--overwrite' in capsys.readouterr().err
    evaluated(tmp_path / 'out', bag, '--overwrite')
