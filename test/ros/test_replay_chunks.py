"""Chunks in the replay: every image comes out once, with its own stamp."""

import pytest
from recordings import recorded, replay, stamp, write_images

from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.session import StreamSession
from stream3r_ros.cli import main
from stream3r_ros.conversions import stamp_ns

STAMPS = [stamp(index) for index in range(6)]


def test_every_third_image_of_a_bag_is_taken(tmp_path):
    sets = ['--set', 'model.weights=random', '--set', 'image.long_side=56']
    summary = replay(tmp_path / 'out', write_images(tmp_path / 'bag'), *sets, '--every', '3')
    assert (summary['images_in'], summary['images_out']) == (2, 2)
    assert read_trajectory(tmp_path / 'out' / 'trajectory.tum').stamps_ns.tolist() == STAMPS[::3]


def test_every_zeroth_image_is_refused(tmp_path, capsys):
    bag = str(write_images(tmp_path / 'bag'))
    assert main(['replay', bag, '--output', str(tmp_path / 'none'), '--every', '0']) == 1
    assert '--every must be at least 1' in capsys.readouterr().err


@pytest.mark.parametrize('mode, tree', [('stac', 'cache'), ('stac_paper', 'cache_paper')])
@pytest.mark.parametrize('chunk_size', [1, 4])
def test_every_image_of_a_chunk_comes_out_with_its_stamp(tmp_path, mode, tree, chunk_size):
    sets = [f'session.mode={mode}', f'{tree}.chunk_size={chunk_size}', 'model.weights=random']
    sets += ['image.long_side=56', 'cache.max_bytes=40000000']
    summary = replay(
        tmp_path / 'out',
        write_images(tmp_path / 'bag'),
        *(part for pair in sets for part in ('--set', pair)),
    )
    assert (summary['images_in'], summary['images_out'], summary['refused']) == (6, 6, [])
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == STAMPS
    transforms = recorded(tmp_path / 'out')['/tf']
    assert [stamp_ns(m.transforms[0]) for m in transforms] == STAMPS


@pytest.mark.parametrize('backend', ['none', 'submaps'])
def test_a_step_that_cannot_be_stored_costs_its_image_and_not_the_run(
    tmp_path, monkeypatch, backend
):
    stored, commit = [], StreamSession._commit

    def commit_or_fail(self, *args, **kwargs):
        stored.append(self)
        if len(stored) == 3:
            raise MemoryError('no room')
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(StreamSession, '_commit', commit_or_fail)
    sets = [f'backend.kind={backend}', 'model.weights=random', 'image.long_side=56']
    summary = replay(
        tmp_path / 'out',
        write_images(tmp_path / 'bag'),
        *(part for pair in sets for part in ('--set', pair)),
    )
    assert (summary['images_in'], summary['images_out']) == (6, 5)
    (refused,) = summary['refused']
    assert 'no room' in refused and 'a new session goes on from the last trusted pose' in refused
    trajectory = read_trajectory(tmp_path / 'out' / 'trajectory.tum')
    assert trajectory.stamps_ns.tolist() == [s for s in STAMPS if s != STAMPS[2]]
    if backend == 'submaps':
        assert summary['backend']['submaps'] == 2
