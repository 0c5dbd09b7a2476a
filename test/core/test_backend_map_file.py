"""Saved maps: all comes back, work goes on, damage is named, a kill leaves the old file."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backend_walks import FRAMES, ate, feed, make_backend
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stream3r_core.backend.map_file import load_map, save_map
from stream3r_core.errors import DataError, InputError, OutputError
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk

ROOT = Path(__file__).resolve().parents[2]
SESSIONS = [range(0, 24), range(21, 45), range(42, 66)]


@pytest.fixture(scope='module')
def mapped():
    walk = make_walk('laps', 0, size_m=0.5)
    front_end = SimulatedFrontEnd(walk, 0, session_frames=FRAMES)
    backend = make_backend(front_end)
    feed(backend, front_end)
    backend.settle()
    assert backend.graph.loops
    return walk, front_end, backend


def test_everything_comes_back(mapped, tmp_path):
    _, front_end, backend = mapped
    save_map(backend, tmp_path / 'home.map')
    again = make_backend(front_end)
    load_map(again, tmp_path / 'home.map')
    for corrected in (True, False):
        for mine, theirs in zip(again.trajectory(corrected), backend.trajectory(corrected)):
            np.testing.assert_array_equal(mine, theirs)
    for name in ('points_xyz', 'colors_rgb', 'confidence'):
        mine, theirs = (getattr(b.atlas.cloud(), name) for b in (again, backend))
        np.testing.assert_array_equal(mine, theirs)
    for key, submap in backend.atlas.submaps.items():
        for mine, theirs in zip(again.atlas.submaps[key].keyframes, submap.keyframes, strict=True):
            for name, value in vars(theirs).items():
                np.testing.assert_array_equal(getattr(mine, name), value)
    assert len(again.places) == len(backend.places)
    kinds = [(e.kind, e.keys, e.on_trial) for e in backend.graph.edges]
    assert [(e.kind, e.keys, e.on_trial) for e in again.graph.edges] == kinds
    again.settle()
    np.testing.assert_allclose(again.trajectory()[2], backend.trajectory()[2], atol=0.02)


def test_saving_what_was_loaded_gives_the_same_content(mapped, tmp_path):
    _, front_end, backend = mapped
    save_map(backend, tmp_path / 'a.map')
    again = make_backend(front_end)
    load_map(again, tmp_path / 'a.map')
    save_map(again, tmp_path / 'b.map')
    with safe_open(tmp_path / 'a.map', 'np') as x, safe_open(tmp_path / 'b.map', 'np') as y:
        assert json.loads(x.metadata()['map']) == json.loads(y.metadata()['map'])
    x, y = (load_file(tmp_path / name) for name in ('a.map', 'b.map'))
    assert sorted(x) == sorted(y)
    for name, array in x.items():
        np.testing.assert_array_equal(array, y[name], err_msg=name)
        assert array.dtype == y[name].dtype


def test_a_map_of_other_weights_is_refused_and_drift_is_known_again(mapped, tmp_path):
    _, front_end, backend = mapped
    ours, theirs = 'a' * 64, 'b' * 64
    for saved, running, is_refused in (
        (ours, ours, False), (ours, theirs, True), ('', theirs, False), (ours, '', False),
    ):  # fmt: skip
        backend.network, backend.arbiter.drift_factor = saved, 3.5
        save_map(backend, tmp_path / 'home.map')
        again = make_backend(front_end)
        again.network = running
        if is_refused:
            with pytest.raises(DataError, match=r'home\.map was made with weights .* aaaa'):
                load_map(again, tmp_path / 'home.map')
            continue
        load_map(again, tmp_path / 'home.map')
        assert again.arbiter.drift_factor == 3.5
    backend.network, backend.arbiter.drift_factor = '', 1.0


def test_a_robot_that_wakes_elsewhere_in_a_saved_map_finds_its_place(mapped, tmp_path):
    walk, front_end, backend = mapped
    save_map(backend, tmp_path / 'home.map')
    again = make_backend(front_end)
    load_map(again, tmp_path / 'home.map')
    shift = again.last_frame_id + 1  # the way is walked once more, from its middle
    updates = feed(again, front_end, [range(30, 54)], shift=shift)
    assert updates[0].alignment.method == 'none'
    again.settle()
    assert sum(len(u.loops) for u in updates) >= 2
    frame_ids, _, T_map = again.trajectory()
    known = np.where(frame_ids >= shift, frame_ids - shift, frame_ids)
    together = ate(T_map, walk.T_world_camera[known])
    assert together < 1.5 * ate(backend.trajectory()[2], walk.T_world_camera) + 0.05


def test_a_map_is_whole_though_its_last_frames_were_never_followed(tmp_path):
    front_end = SimulatedFrontEnd(make_walk('corridor', 0, size_m=0.3), 0, session_frames=24)
    backend = make_backend(front_end)
    frames = [p for r in (range(24), range(21, 45)) for p in front_end.session(r)]
    for frame, prediction in frames[:35]:
        update = backend.track(prediction, frame)
        if frame < 20:
            backend.follow(update, lambda frame=frame: front_end.descriptor(frame))
    assert len(backend.graph) < len(backend.atlas.submaps)  # as after a worker was closed
    backend.join_rest()
    backend.settle()
    save_map(backend, tmp_path / 'home.safetensors')
    loaded = make_backend(front_end)
    load_map(loaded, tmp_path / 'home.safetensors')
    assert len(loaded.graph) == len(loaded.atlas.submaps) == len(backend.atlas.submaps)


def test_a_file_that_is_no_map_is_refused_in_one_line(mapped, tmp_path):
    _, front_end, backend = mapped
    save_map(backend, tmp_path / 'whole.map')
    whole = (tmp_path / 'whole.map').read_bytes()
    contents = {
        'cut.map': whole[: len(whole) // 2],
        'head.map': whole[:100],
        'empty.map': b'',
        'text.map': b'not a map at all' * 10,
        'ply.map': b'ply\nformat binary_little_endian 1.0\nend_header\n',
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    save_file({'x': np.ones(3)}, tmp_path / 'foreign.map')
    save_file(
        {'x': np.ones(3)}, tmp_path / 'newer.map', {'format': 'stream3r-map', 'version': '9'}
    )
    bare = {'format': 'stream3r-map', 'version': '1', 'map': json.dumps({'submaps': [{'key': 0}]})}
    save_file({'x': np.ones(3)}, tmp_path / 'damaged.map', bare)
    for name in (*contents, 'foreign.map', 'newer.map', 'damaged.map', 'missing.map'):
        fresh = make_backend(front_end)
        with pytest.raises(DataError) as caught:
            load_map(fresh, tmp_path / name)
        message = str(caught.value)
        assert name in message and '\n' not in message
        assert not fresh.atlas.submaps


def test_a_map_is_not_loaded_over_another(mapped, tmp_path):
    save_map(mapped[2], tmp_path / 'home.map')
    with pytest.raises(InputError, match='holds a map already'):
        load_map(mapped[2], tmp_path / 'home.map')


def test_a_folder_that_is_not_there_is_an_output_error(mapped, tmp_path):
    with pytest.raises(OutputError, match='cannot write'):
        save_map(mapped[2], tmp_path / 'no' / 'home.map')


def test_a_map_of_one_frame_and_an_empty_one_are_saved(tmp_path):
    front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0, session_frames=FRAMES)
    for count in (0, 1):
        backend = make_backend(front_end)
        if count:
            feed(backend, front_end, [range(1)])
        save_map(backend, tmp_path / 'small.map')
        again = make_backend(front_end)
        load_map(again, tmp_path / 'small.map')
        assert len(again.trajectory()[0]) == count
        feed(again, front_end, [range(5, 10)], shift=1)
        assert len(again.trajectory()[0]) == count + 5


KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import stream3r_core.files as files
from backend_walks import *
from stream3r_core.backend.map_file import save_map
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk

front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0, session_frames=FRAMES)
backend = make_backend(front_end)
feed(backend, front_end, [range(0, 10)])
save_map(backend, {path!r})
print('saved', flush=True)
feed(backend, front_end, [range(7, 20)])
{kill}
save_map(backend, {path!r})
"""
KILLS = {  # the moments at which a half-written file could show
    'before the data is on disk': """
def kill(descriptor): os.kill(os.getpid(), signal.SIGKILL)
files.os.fsync = kill
""",
    'before the rename': """
def kill(*paths): os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = kill
""",
}


@pytest.mark.parametrize('moment', KILLS)
def test_a_kill_while_saving_leaves_the_previous_map_intact(moment, tmp_path):
    path = tmp_path / 'home.map'
    tests = str(Path(__file__).parent)
    code = KILLED_WHILE_SAVING.format(
        root=str(ROOT), tests=tests, path=str(path), kill=KILLS[moment]
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL and run.stdout.split() == ['saved'], run.stderr
    front_end = SimulatedFrontEnd(make_walk('corridor', 0), 0, session_frames=FRAMES)
    backend = make_backend(front_end)
    load_map(backend, path)
    assert len(backend.trajectory()[0]) == 10
    save_map(backend, path)  # what the killed process left behind does no harm
