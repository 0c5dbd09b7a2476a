"""What is trained on: folders of scenes, drawn as published, and nothing that is held out."""

import random

import numpy as np
import pytest
import torch

from stream3r_core.errors import DataError
from stream3r_core.synthetic import CALM, render_sequence
from stream3r_core.synthetic.clips import texture_pool
from stream3r_core.synthetic.folders import write_scene_folder
from stream3r_core.training import data
from stream3r_core.training.folders import SceneFolder, choose_views
from stream3r_core.training.settings import FolderConfig, StageConfig, TrainingConfig

SIZE = (24, 32)


@pytest.fixture(scope='module')
def recording():
    return render_sequence(seed=2, num_frames=4, height=24, width=32)


@pytest.fixture
def room(recording, tmp_path):
    return write_scene_folder(recording, tmp_path / 'room')


def load(room, frames=4):
    config = FolderConfig(path=str(room.parent), video_prob=1.0, max_interval=1)
    return SceneFolder(config).batch(1, frames, SIZE, seed=0)


def write_camera(room, recording, index=1, **changes):
    camera = {'intrinsics': recording.K, 'pose': recording.T_world_camera[index]}
    np.savez(room / 'cam' / f'{index:06d}.npz', **(camera | changes))


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(('name', 'length'), [('cam', 200), ('depth', 0), ('depth', 500)])
def test_torn_files_are_named(room, name, length):
    [path] = (room / name).glob('000001.*')
    cut(path, length)
    with pytest.raises(DataError, match=f'{path.name}: expected'):
        load(room)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'pose': np.eye(4)[:3]}, r'pose \[4, 4\].*got \[3, 4\]'),
        ({'pose': 2 * np.eye(4)}, 'without scale'),
        ({'pose': np.diag([2.0, 2.0, 2.0, 1.0])}, 'without scale'),
        ({'pose': np.diag([1.0, 1.0, -1.0, 1.0])}, 'without scale'),
        ({'intrinsics': np.array([50.0, 50.0, 16.0, 12.0])}, r'intrinsics \[3, 3\].*got \[50'),
        ({'intrinsics': np.full((3, 3), np.nan)}, r'intrinsics \[3, 3\].*nan'),
    ],
)
def test_cameras_that_are_none_are_named(room, recording, changes, message):
    write_camera(room, recording, **changes)
    with pytest.raises(DataError, match=rf'000001\.npz.*{message}'):
        load(room)


@pytest.mark.parametrize(
    'change', [lambda d: (d * 1000).astype(np.uint16), lambda d: d[..., None]]
)
def test_depth_that_is_not_metres_per_pixel_is_named(room, recording, change):
    np.save(room / 'depth' / '000001.npy', change(recording.depth_m[1].numpy()))
    with pytest.raises(DataError, match=r'000001\.npy: expected floating-point metres \[24, 32\]'):
        load(room)


def test_views_whose_camera_was_lost_are_never_chosen(room, recording):
    for index in (1, 2):
        write_camera(room, recording, index, pose=np.full((4, 4), -np.inf))
    seen = load(room, frames=2).T_world_camera
    np.testing.assert_allclose(seen[0], recording.T_world_camera[[0, 3]], atol=1e-6)
    assert (load(room, frames=2).images == load(room, frames=2).images).all()
    for index in (0, 3):
        write_camera(room, recording, index, pose=np.full((4, 4), np.nan))
    with pytest.raises(DataError, match='room: no view has a finite camera pose'):
        load(room)


def draws(total, frames, count=2000, **changes):
    rng = random.Random(0)
    options = {'max_interval': 20, 'video_prob': 1.0, 'fix_interval_prob': 0.0} | changes
    return np.array([choose_views(total, frames, rng, **options) for _ in range(count)])


@pytest.mark.parametrize(('total', 'largest'), [(11, 2), (30, 6), (60, 13), (500, 20)])
def test_intervals_reach_the_published_limit(total, largest):
    """The largest interval is min(max_interval, 2 remaining / (S - 1)), from any start."""
    views = draws(total, 10)
    intervals = np.diff(views)
    assert intervals.min() == 1 and intervals.max() == largest
    assert views.min() == 0 and views.max() == total - 1
    if total < 100:
        assert set(views[:, 0]) == set(range(total - 9))  # all that leave enough views


def test_intervals_are_drawn_evenly():
    step = np.diff(draws(2000, 2)).ravel()
    assert np.bincount(step)[1:] == pytest.approx(np.full(20, 100), abs=40)


def test_a_constant_stride_stays_constant_and_reaches_the_end():
    views = draws(30, 10, fix_interval_prob=1.0)
    steps = np.diff(views)
    assert (steps == steps[:, :1]).all() and set(steps[:, 0]) == {1, 2, 3}


def test_short_scenes_are_walked_to_and_fro_and_shuffled_as_long_ones():
    videos, loose = draws(4, 8), draws(4, 8, video_prob=0.0)
    assert (np.abs(np.diff(videos)) == 1).all() and set(videos[:, 0]) == {0, 1, 2, 3}
    assert (np.abs(np.diff(loose)) != 1).any(1).mean() > 0.8
    assert (draws(1, 3) == 0).all()


def in_blocks(ranks, size):
    """Whether the views are runs of ``size`` neighbours, in any order within and among them."""
    blocks = {rank // size for rank in ranks}
    places = [[i for i, rank in enumerate(ranks) if rank // size == b] for b in blocks]
    return all(max(p) - min(p) == len(p) - 1 for p in places)


def test_a_collection_is_shuffled_in_blocks():
    ranks = draws(200, 10, count=500, video_prob=0.0).argsort(1).argsort(1)
    share = np.mean([any(in_blocks(r, size) for size in range(2, 10)) for r in ranks])
    assert share > 0.8  # block sizes are drawn from 2 .. 10, and 10 is any order
    assert (ranks != np.sort(ranks)).any(1).mean() > 0.9


def test_held_out_cameras_are_carried_in_the_first_way_of_their_stage(monkeypatch):
    """Validation and the tables of the model card are of the family that the stage names."""
    drawn = []
    monkeypatch.setattr(data, 'rendered', lambda count, clip, *_: drawn.append(clip))
    stage = StageConfig(motions=('calm', 'drone'), room_half_m=(2.0, 3.0), fov_deg=(58.0, 66.0))
    list(data.held_out_batches(TrainingConfig(validation_scenes=1), stage))
    (clip,) = drawn
    assert clip.motion is CALM
    assert (clip.room_half_m, clip.fov_deg) == ((2.0, 3.0), (58.0, 66.0))


def test_held_out_sequences_have_seeds_and_textures_that_training_never_draws(monkeypatch):
    drawn = []

    def sample_clips(count, clip, seed, device):
        drawn.append((seed, clip.texture_seed))
        return original(count, clip, seed, device)

    original = data.sample_clips
    monkeypatch.setattr(data, 'sample_clips', sample_clips)
    stage = StageConfig(batch=1, size_hw=(16, 16), frames=(1,))
    config = TrainingConfig(stages=(stage,), validation_scenes=6, validation_frames=1)
    mixture = data.DataMixture(config)
    for draw in range(30):
        mixture.batch(0, draw)
    trained = drawn.copy()
    mixture.held_out(0)
    held_out = drawn[len(trained) :]
    assert len(held_out) == 2 and len({seed for seed, _ in trained}) == 30
    # A generator reads 32 bits: whatever is drawn lies above all held-out ones in those.
    many = [data.step_seed(config.seed, draw) for draw in range(5000)]
    lowest = min(seed % (1 << 32) for seed in [*many, *(seed for seed, _ in trained)])
    assert max(seed % (1 << 32) for seed, _ in held_out) < 1 << 24 <= lowest
    assert not {t for _, t in trained} & {t for _, t in held_out}
    ours, theirs = (texture_pool(drawn[i][1]).texels.view(256, -1) for i in (0, -1))
    assert torch.cdist(ours, theirs).min() > 1
