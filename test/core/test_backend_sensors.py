"""Other sensors in the graph: odometry lowers the error, a metre is a metre, lies cost little."""

import numpy as np
import pytest
from backend_rings import EXACT, between, chain, ring
from backend_walks import CONFIG, FRAMES, ate, make_backend
from scipy.spatial.transform import Rotation

from stream3r_core.backend import sim3
from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.map_file import load_map, save_map
from stream3r_core.backend.sensors import Measured, Sensed, SensorFactors, SubmapSenses
from stream3r_core.synthetic.front_end import Disturbance, SimulatedFrontEnd, make_walk

SEEDS = range(3)
EXACT_BUT_FOR_UNITS = Disturbance(0, 0, 0, 0, 0, unit=0.5, pair=0)


def odometry(walk, seed, num_jumps=0):
    """T_odom_camera [N, 4, 4]: 1 % of noise, and places where the robot is carried away."""
    rng, T = np.random.default_rng(seed), walk.T_world_camera
    jumps = rng.choice(len(T) - 1, num_jumps, replace=False)
    poses = [np.eye(4)]
    for k in range(len(T) - 1):
        step = sim3.inverse(T[k]) @ T[k + 1]
        step[:3, 3] *= 1 + 0.01 * rng.standard_normal()
        if k in jumps:
            step[:3, 3] += rng.uniform(-5, 5, 3)
            step[:3, :3] = Rotation.from_rotvec(rng.uniform(-1, 1, 3)).as_matrix()
        poses.append(poses[-1] @ step)
    return np.array(poses)


def run(seed, sense, disturbance=None, config=CONFIG):
    """Walk a corridor, which never comes back; return the back end and the truth of its poses."""
    walk = make_walk('corridor', seed, size_m=0.5)
    front_end = SimulatedFrontEnd(walk, seed, disturbance, session_frames=FRAMES, size_hw=(12, 16))
    backend, known = make_backend(front_end, config), sense(walk, front_end)
    for frame, prediction in front_end:
        backend.add(prediction, frame, sensed=known(frame, prediction))
    backend.settle()
    return backend, walk.T_world_camera[backend.trajectory()[0]]


def error(*arguments, **options):
    backend, truth = run(*arguments, **options)
    return ate(backend.trajectory()[2], truth)


def nothing(walk, front_end):
    return lambda frame, prediction: None


def wheels(num_jumps=0):
    def sense(walk, front_end):
        T_odom_camera = odometry(walk, 5, num_jumps)
        return lambda frame, prediction: Sensed(T_odom_camera=T_odom_camera[frame])

    return sense


def depth_camera(walk, front_end):
    """Ratios of true and predicted depth: noisy, every fifth nonsense."""
    rng = np.random.default_rng(0)

    def sense(frame, prediction):
        true_m = front_end.hall.depth(walk.T_world_camera[frame], front_end.K, (12, 16))
        said = prediction.depth.numpy()
        both = (true_m > 0) & (said > 0)
        ratio = np.median(true_m[both] / said[both]) * np.exp(0.02 * rng.standard_normal())
        return Sensed(
            metres_per_unit=float(ratio * (rng.uniform(0.2, 5) if frame % 5 == 0 else 1))
        )

    return sense


def length(poses):
    return np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()


@pytest.fixture(scope='module')
def alone():
    return [error(seed, nothing) for seed in SEEDS]


def test_with_odometry_the_error_falls(alone):
    fused = [error(seed, wheels()) for seed in SEEDS]
    assert np.sum(fused) < 0.8 * np.sum(alone)
    assert np.median(np.divide(fused, alone)) < 0.9


def test_a_robot_that_is_carried_away_spoils_nothing(alone):
    backends = [run(seed, wheels(num_jumps=2)) for seed in SEEDS]
    errors = [ate(backend.trajectory()[2], truth) for backend, truth in backends]
    assert np.sum(errors) < 0.9 * np.sum(alone) and np.max(np.divide(errors, alone)) < 1.3
    lengths = [length(backend.trajectory()[2]) / length(truth) for backend, truth in backends]
    np.testing.assert_allclose(lengths, 1, atol=0.03)  # and metres are metres


def test_a_network_far_worse_than_its_model_yields_to_odometry():
    bad = Disturbance(rotation_deg=6.0, translation=0.1, scale=0.2)
    alone = [error(seed, nothing, bad) for seed in SEEDS]
    fused = [run(seed, wheels(), bad) for seed in SEEDS]
    errors = [ate(backend.trajectory()[2], truth) for backend, truth in fused]
    assert np.sum(errors) < 0.7 * np.sum(alone)
    assert all(backend.arbiter.drift_factor > 3 for backend, _ in fused)


def test_a_depth_camera_fixes_the_scale_of_the_whole_map():
    for seed in (0, 1):
        free, truth = run(seed, nothing, EXACT_BUT_FOR_UNITS)
        fixed, _ = run(seed, depth_camera)
        assert not free.graph.is_metric and fixed.graph.is_metric
        assert length(fixed.trajectory()[2]) / length(truth) == pytest.approx(1, abs=0.02)
        for corrected in (True, False):  # path and odometry take the unit together
            poses = fixed.trajectory(corrected)[2]
            assert length(poses) / length(truth) == pytest.approx(1, abs=0.1)
        scale = sim3.scale_of(fixed.atlas.S_map_submap(0))
        assert abs(np.log(scale)) > 1e-3  # the first submap had another


def test_the_up_of_an_odometry_keeps_the_map_level():
    def up(walk, front_end):
        return lambda frame, prediction: Sensed(up_camera=walk.T_world_camera[frame, 2, :3])

    tilts = []
    for seed in SEEDS:
        for sense in (nothing, up):
            backend, truth = run(seed, sense, Disturbance(rotation_deg=4.0))
            poses = truth[0] @ backend.trajectory()[2]
            cosines = (poses[:, 2, :3] * truth[:, 2, :3]).sum(1)
            tilts.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    without, level = np.reshape(tilts, (-1, 2)).T
    assert level.sum() < 0.9 * without.sum() and (level < 1.05 * without).all(), tilts


def test_sensors_that_say_nothing_change_nothing(alone):
    backend, truth = run(0, lambda walk, front_end: lambda frame, prediction: Sensed())
    assert {edge.kind for edge in backend.graph.edges} == {'anchor', 'odometry'}
    assert not backend.graph.is_metric
    assert ate(backend.trajectory()[2], truth) == alone[0]


def test_a_submap_tells_its_scale_early_and_once_more_at_its_end():
    backend, _ = run(0, depth_camera)
    scales = [edge for edge in backend.graph.edges if edge.kind == 'scale']
    assert [edge.keys for edge in scales] == sorted({edge.keys for edge in scales})
    senses = SubmapSenses(3)
    for ratio in (2.0, float('nan'), -1.0, 2.2, 1.8):
        senses.add(Sensed(metres_per_unit=ratio), np.eye(4))
    assert senses.scale() == ('scale', (3,), pytest.approx(2.0))


def test_a_loaded_metric_map_is_not_rescaled_by_the_first_wrong_scale(tmp_path):
    backend, _ = run(0, depth_camera)
    save_map(backend, tmp_path / 'home.map')
    again = SubmapBackend(CONFIG)
    load_map(again, tmp_path / 'home.map')
    newest = again.graph.keys[-1]
    wrong = Measured('scale', (newest,), 3 * float(sim3.scale_of(again.graph.pose(newest))))
    sensors = SensorFactors(again.arbiter, CONFIG)
    assert sensors.take([wrong]) != 1  # knows of no other one
    again = SubmapBackend(CONFIG)
    load_map(again, tmp_path / 'home.map')
    assert not again._measure((wrong,))
    lengths = [length(b.trajectory()[2]) for b in (again, backend)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-6)


def test_what_was_measured_outlives_the_folding_of_its_submaps():
    truth = ring(12)
    graph = chain(truth, np.random.default_rng(0), sigmas=0)
    for k in range(1, 12):
        motion = sim3.inverse(sim3.rigid_of(truth[k - 1])) @ sim3.rigid_of(truth[k])
        graph.add_motion(k - 1, k, motion, EXACT[:6, :6])
    graph.add_scale(7, float(sim3.scale_of(truth[7])))
    graph.add_gravity(7, sim3.rotation_of(truth[7])[2], np.array([0, 0, 1.0]))
    graph.step()
    graph.fold([(5, 4), (7, 6)])
    by_kind = {k: [e for e in graph.edges if e.kind == k] for k in ('motion', 'scale', 'gravity')}
    keys = [edge.keys for edge in by_kind['motion']]
    assert (4, 6) in keys and (6, 8) in keys and len(keys) == 9
    joined = next(edge for edge in by_kind['motion'] if edge.keys == (4, 6))
    expected = sim3.inverse(sim3.rigid_of(truth[4])) @ sim3.rigid_of(truth[6])
    np.testing.assert_allclose(joined.measurement, expected, atol=1e-6)
    assert by_kind['scale'][0].keys == (6,)
    assert by_kind['scale'][0].measurement[0] == pytest.approx(float(sim3.scale_of(truth[6])))
    up, _ = by_kind['gravity'][0].measurement
    np.testing.assert_allclose(up, sim3.rotation_of(truth[6])[2], atol=1e-6)


def test_a_map_takes_another_unit_as_a_whole():
    truth = ring(10)
    graph = chain(truth, np.random.default_rng(1), sigmas=0)
    assert not graph.is_metric
    graph.rescale(3.0)
    assert graph.is_metric
    for k in range(10):
        np.testing.assert_allclose(graph.pose(k)[:3], 3 * truth[k][:3], atol=1e-6)
        np.testing.assert_allclose(
            between({0: graph.pose(0), k: graph.pose(k)}, 0, k), between(truth, 0, k), atol=1e-6
        )
    graph.add_scale(0, 3.0)
    graph.add_scale(0, 6.0)  # in its place
    graph.step()
    assert [float(e.measurement[0]) for e in graph.edges if e.kind == 'scale'] == [6.0]
