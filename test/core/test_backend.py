"""The back end on simulated walks: loops close, nothing else moves, all that grows is bounded."""

from dataclasses import replace

import numpy as np
import pytest
from backend_walks import CONFIG, FRAMES, ate, feed, make_backend, pairs_of

from stream3r_core.backend import sim3
from stream3r_core.backend.atlas_map import AtlasMap
from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.config import BackendConfig, SubmapConfig
from stream3r_core.config import MappingConfig
from stream3r_core.errors import InputError
from stream3r_core.synthetic.front_end import Disturbance, SimulatedFrontEnd, make_walk

EXACT = Disturbance(0, 0, 0, 0, 0, unit=0.3, pair=0)


@pytest.fixture(scope='module')
def laps():
    """Three times round a block, with a back end."""
    walk = make_walk('laps', 0, size_m=0.8)
    front_end = SimulatedFrontEnd(walk, 0, session_frames=FRAMES)
    backend = make_backend(front_end)
    updates = feed(backend, front_end)
    assert backend.settle()
    return walk, backend, updates


def test_loops_take_out_most_of_the_drift(laps):
    walk, backend, updates = laps
    frame_ids, stamps_ns, T_map = backend.trajectory()
    np.testing.assert_array_equal(frame_ids, np.arange(len(walk.stamps_ns)))
    np.testing.assert_array_equal(stamps_ns, walk.stamps_ns)
    without = ate(backend.trajectory(corrected=False)[2], walk.T_world_camera)
    assert ate(T_map, walk.T_world_camera) < 0.25 * without
    assert sum(len(update.loops) for update in updates) > 20


def test_an_exact_front_end_gives_the_exact_path_whatever_the_units_of_its_sessions():
    walk = make_walk('laps', 3, size_m=0.5)
    front_end = SimulatedFrontEnd(walk, 3, EXACT, session_frames=FRAMES)
    backend = make_backend(front_end)
    feed(backend, front_end, [range(0, 24), range(21, 45), range(42, 60)])
    scales = [float(sim3.scale_of(backend.graph.pose(key))) for key in backend.graph.keys]
    assert max(scales) / min(scales) > 1.05
    frame_ids, _, T_map = backend.trajectory()
    assert ate(T_map, walk.T_world_camera[frame_ids]) < 1e-3


@pytest.mark.parametrize('kind', ['corridor', 'spiral'])
def test_without_loops_the_path_is_that_of_the_front_end(kind):
    walk = make_walk(kind, 1, size_m=0.4)
    front_end = SimulatedFrontEnd(walk, 1, session_frames=FRAMES)
    backend = make_backend(front_end)
    updates = feed(backend, front_end)
    backend.settle()
    with_loops, without = (backend.trajectory(corrected)[2] for corrected in (True, False))
    np.testing.assert_allclose(with_loops, without, atol=1e-6)
    np.testing.assert_allclose(backend.T_map_odom(), np.eye(4), atol=1e-6)
    assert not any(update.loops or update.moved for update in updates)


def test_false_loops_that_pass_verification_change_nothing(laps):
    walk, clean, _ = laps
    front_end = SimulatedFrontEnd(walk, 0, session_frames=FRAMES)
    backend, rng = make_backend(front_end), np.random.default_rng(5)
    covariance = np.diag([0.01] * 3 + [0.06] * 3 + [0.02]) ** 2
    for frame, prediction in front_end:
        update = backend.add(prediction, frame, lambda f=frame: front_end.descriptor(f))
        for _, j in update.loops:
            if rng.random() < 0.3 / 0.7:
                S = sim3.exp(0.3 * rng.standard_normal(7))
                backend.propose_loop(int(rng.integers(j)), j, S, covariance)
    backend.settle()
    expected = ate(clean.trajectory()[2], walk.T_world_camera)
    assert ate(backend.trajectory()[2], walk.T_world_camera) == pytest.approx(expected, rel=0.1)


def test_map_path_and_correction_agree(laps):
    _, backend, _ = laps
    newest = backend.trajectory()[2][-1]
    in_odom = backend.trajectory(corrected=False)[2][-1]
    np.testing.assert_allclose(backend.T_map_odom() @ in_odom, newest, atol=1e-9)
    assert not np.allclose(backend.T_map_odom(), np.eye(4), atol=1e-3)
    change = AtlasMap(backend.atlas).changed_since(-1)
    np.testing.assert_array_equal(change.points_xyz, backend.atlas.cloud().points_xyz)


def test_points_lie_on_the_surfaces_of_the_world_and_move_with_their_submap():
    walk = make_walk('laps', 2)
    front_end = SimulatedFrontEnd(walk, 2, EXACT, session_frames=FRAMES)
    backend = make_backend(front_end)
    feed(backend, front_end, [range(0, 24), range(21, 45)])
    unit = front_end_unit(backend, walk)
    points = sim3.act(unit, backend.atlas.cloud().points_xyz.astype(float))
    above, below = np.abs(points[:, 2] - 3.0), np.abs(points[:, 2])
    pillars = np.linalg.norm(points[:, None, :2] - front_end.hall.centres, axis=-1)
    to_surface = np.minimum(np.minimum(above, below), np.abs(pillars - 0.4).min(1))
    assert np.quantile(to_surface, 0.95) < 0.05
    moved = backend.graph.pose(1) @ sim3.exp(np.array([0, 0, 0, 1.0, 0, 0, 0]))
    version = backend.atlas.version
    backend.atlas.place({0: backend.graph.pose(0), 1: moved})
    change = backend.atlas.changed_since(version)
    assert list(change.rows) == [1] and not any(map(len, change.gone.values()))
    np.testing.assert_array_equal(change.rows[1].S_map_submap, moved)


def front_end_unit(backend, walk):
    """Similarity that takes the map to the true world."""
    frame_ids, _, T_map = backend.trajectory()
    truth, estimate = walk.T_world_camera[frame_ids], T_map
    scale = (
        np.ptp(truth[:, :3, 3], axis=0).max()
        / np.ptp((truth[0] @ estimate)[:, :3, 3], axis=0).max()
    )
    return truth[0] @ sim3.from_parts(scale, np.eye(3), np.zeros(3))


def test_a_pause_without_overlap_is_bridged_and_reported():
    walk = make_walk('corridor', 4)
    front_end = SimulatedFrontEnd(walk, 4, session_frames=FRAMES)
    backend = make_backend(front_end)
    updates = feed(backend, front_end, [range(0, 24), range(26, 50)])
    alignments = [u.alignment for u in updates if u.alignment is not None]
    assert [a.method for a in alignments] == ['constant velocity']
    assert alignments[0].is_lost and alignments[0].degeneracies == ('no overlap',)
    frame_ids, _, T_map = backend.trajectory()
    assert ate(T_map, walk.T_world_camera[frame_ids]) < 0.5


def test_a_session_that_fails_at_once_is_dropped():
    walk = make_walk('corridor', 5)
    front_end = SimulatedFrontEnd(walk, 5, EXACT, session_frames=FRAMES)
    backend = make_backend(front_end)
    feed(backend, front_end, [range(0, 24), range(21, 23), range(21, 45)])
    frame_ids, _, T_map = backend.trajectory()
    np.testing.assert_array_equal(frame_ids, np.arange(45))
    assert len(backend.graph) == 2
    assert ate(T_map, walk.T_world_camera[:45]) < 1e-3


def test_an_endless_corridor_stays_within_every_budget():
    limits = SubmapConfig(
        max_frames=12, max_submaps=10, max_points=3000, max_submap_points=1000, max_keyframes=60,
        max_images=20, max_poses=80,
    )  # fmt: skip
    walk = make_walk('corridor', 6, size_m=1.4)
    front_end = SimulatedFrontEnd(walk, 6, session_frames=12, size_hw=(12, 16))
    backend = make_backend(front_end, BackendConfig(submaps=limits))
    sizes = []
    for frame, prediction in front_end:
        backend.add(prediction, frame, lambda f=frame: front_end.descriptor(f))
        keyframes = [k for s in backend.atlas.submaps.values() for k in s.keyframes]
        sizes.append(
            (
                len(backend.atlas.submaps) - 1,  # one is open
                len(backend.graph.edges) - 1,
                len(backend.places) - 12,  # those that keep their image, as others prove nothing
                len(keyframes) - 12,
                sum(k.image_rgb is not None for k in keyframes) - 12,
                len(backend.trajectory()[0]) - 12,
                backend.atlas.num_points - limits.max_submap_points,
            )
        )
    worst = np.array(sizes).max(0)
    assert (worst <= (10, 10, 20, 60, 20, 80, 3000)).all(), worst
    assert backend.next_key > 40
    frame_ids, _, T_map = backend.trajectory()
    assert frame_ids[0] < 12 and frame_ids[-1] == len(walk.stamps_ns) - 1  # thinned, not cut
    assert ate(T_map, walk.T_world_camera[frame_ids]) < 0.05 * len(walk.stamps_ns) * 0.4


def test_a_loop_closes_after_the_submaps_in_between_were_folded():
    limits = replace(CONFIG.submaps, max_submaps=6)
    walk = make_walk('laps', 7, size_m=0.7)
    front_end = SimulatedFrontEnd(walk, 7, session_frames=FRAMES)
    backend = make_backend(front_end, replace(CONFIG, submaps=limits))
    updates = feed(backend, front_end)
    backend.settle()
    assert len(backend.atlas.submaps) <= 7
    assert sum(len(update.loops) for update in updates) > 5
    errors = [ate(backend.trajectory(c)[2], walk.T_world_camera) for c in (True, False)]
    assert errors[0] < 0.8 * errors[1]


def test_consumers_that_follow_the_changes_hold_the_same_map():
    limits = replace(CONFIG.submaps, max_submaps=4)
    walk = make_walk('laps', 8, size_m=0.5)
    front_end = SimulatedFrontEnd(walk, 8, session_frames=FRAMES)
    backend = make_backend(front_end, replace(CONFIG, submaps=limits))
    view, held, version, num_gone, num_sent = AtlasMap(backend.atlas), {}, -1, 0, 0
    for frame, prediction in front_end:
        backend.add(prediction, frame, lambda f=frame: front_end.descriptor(f))
        if frame % 7 and frame != len(walk.stamps_ns) - 1:
            continue
        change = view.changed_since(version)
        assert len(set(change.voxel_ids.tolist())) == len(change.voxel_ids)
        assert change.is_complete == (version == -1)
        version = change.version
        num_gone, num_sent = num_gone + (change.weight == 0).sum(), num_sent + len(change.weight)
        for number, point, weight in zip(change.voxel_ids, change.points_xyz, change.weight):
            if weight:
                held[number] = point
            else:
                assert np.isnan(point).all()
                held.pop(number, None)
    assert num_gone > 0 and num_sent < 20 * len(held)
    whole = view.points().points_xyz
    assert len(held) == len(whole) == view.num_points
    mine = np.array([held[number] for number in sorted(held)])
    np.testing.assert_allclose(mine, whole, atol=1e-2)  # moves of less are not told


def test_misuse_is_refused_in_words():
    front_end = SimulatedFrontEnd(make_walk('corridor', 9), 9, session_frames=FRAMES)
    predictions = [p for _, p in front_end.session(range(5))]
    backend = SubmapBackend(CONFIG, MappingConfig(), pairs_of(front_end))
    with pytest.raises(InputError, match='expected 0; reset'):
        backend.add(predictions[1], 1)
    backend.add(predictions[0], 0)
    with pytest.raises(InputError, match='added already'):
        backend.add(predictions[1], 0)
    lost = replace(predictions[1], T_world_camera=predictions[1].T_world_camera * float('nan'))
    with pytest.raises(InputError, match='no finite pose'):
        backend.add(lost, 1)
    backend.add(predictions[1], 1)
    np.testing.assert_array_equal(backend.trajectory()[0], [0, 1])
