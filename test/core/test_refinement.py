"""Poses that the images themselves confirm: against exact renderings, and against nonsense."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from golden_data import golden_network
from scipy.spatial.transform import Rotation

from stream3r_core import load_model
from stream3r_core.config import CoreConfig, RefinementConfig, SessionConfig
from stream3r_core.direct_alignment import align, make_keyframe, pictures
from stream3r_core.geometry import invert_se3
from stream3r_core.image import ImageGeometry
from stream3r_core.pipeline import Reconstructor, make_session
from stream3r_core.refinement import PoseRefiner, refines
from stream3r_core.synthetic import CALM, render_sequence
from stream3r_core.types import FramePrediction

SIZE_HW = 72, 96
AS_IT_IS = ImageGeometry(SIZE_HW, SIZE_HW, (1.0, 1.0), (0, 0))


@pytest.fixture(scope='module')
def walk():
    return render_sequence(0, 30, *SIZE_HW, fov_deg=62.0, motion=CALM)


def motion(walk, first, second):
    """T_second_first [4, 4] of the true cameras."""
    T = walk.T_world_camera.double().numpy()
    return np.linalg.inv(T[second]) @ T[first]


def errors(T, T_true, unit):
    """Angle in degrees, and distance in ``unit``, between two motions."""
    off = np.linalg.inv(T_true) @ T
    angle = np.linalg.norm(Rotation.from_matrix(off[:3, :3]).as_rotvec())
    return math.degrees(angle), float(np.linalg.norm(off[:3, 3])) / unit


def keyframe_and_image(walk, second=3, change=lambda rgb: rgb):
    K = walk.K.numpy()
    first = pictures(walk.images[0].numpy(), K)
    keyframe = make_keyframe(first, walk.depth_m[0].numpy())
    return keyframe, pictures(change(walk.images[second].numpy()), K)


def lit(gain, offset):
    return lambda rgb: (
        (gain * rgb.astype(np.float32) + offset).clip(0, 255).round().astype(np.uint8)
    )


@pytest.mark.parametrize('change', [lit(1, 0), lit(0.6, 20), lit(0.25, 0), lit(1.3, -30)])
def test_two_images_say_how_the_camera_has_moved_whatever_the_light(walk, change):
    keyframe, image = keyframe_and_image(walk, change=change)
    fit, true = align(keyframe, image, [np.eye(4)]), motion(walk, 0, 3)
    standing = errors(np.eye(4), true, keyframe.median_depth)
    angle, distance = errors(fit.T_camera_key, true, keyframe.median_depth)
    assert standing[0] > 3 and standing[1] > 0.015
    assert angle < 0.3 and distance < 0.008
    assert fit.explained > 0.8 and 0.6 < fit.overlap <= 1


def test_a_bright_image_of_a_dark_keyframe_is_no_riddle(walk):
    """A step that knew nothing of the gain would overshoot, and diverge from twice the light."""
    K = walk.K.numpy()
    dark = pictures(lit(0.3, 0)(walk.images[0].numpy()), K)
    keyframe = make_keyframe(dark, walk.depth_m[0].numpy())
    fit = align(keyframe, pictures(walk.images[3].numpy(), K), [np.eye(4)])
    angle, _ = errors(fit.T_camera_key, motion(walk, 0, 3), keyframe.median_depth)
    assert angle < 0.4 and fit.explained > 0.8


@pytest.mark.parametrize('size_hw', [(8, 112), (112, 8), (15, 15), (2, 2)])
def test_narrow_images_have_levels_that_can_be_looked_at(size_hw):
    rgb = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    K = np.array([[50.0, 0, size_hw[1] / 2], [0, 50, size_hw[0] / 2], [0, 0, 1]])
    levels = pictures(rgb, K)
    fit = align(make_keyframe(levels, np.ones(size_hw)), levels, [np.eye(4)])
    assert np.isfinite(fit.T_camera_key).all()
    assert make_keyframe(pictures(rgb[:1], K), np.ones((1, size_hw[1]))) is None


def test_the_best_guess_is_where_the_search_begins(walk):
    """Half a room away there is no way down to the right motion; with a good guess there is."""
    keyframe, image = keyframe_and_image(walk, 29)
    true = motion(walk, 0, 29)
    wrong = np.eye(4)
    wrong[:3, :3] = Rotation.from_euler('y', 50, degrees=True).as_matrix()
    near = true.copy()
    near[:3, 3] += 0.03
    fit = align(keyframe, image, [wrong, near])
    assert errors(fit.T_camera_key, true, keyframe.median_depth)[0] < 1.5
    assert errors(align(keyframe, image, [wrong]).T_camera_key, true, 1)[0] > 5


def test_lengths_have_the_unit_of_the_depth(walk):
    keyframe, image = keyframe_and_image(walk)
    doubled = make_keyframe(
        pictures(walk.images[0].numpy(), walk.K.numpy()), 2 * walk.depth_m[0].numpy()
    )
    once, twice = (align(k, image, [np.eye(4)]).T_camera_key for k in (keyframe, doubled))
    np.testing.assert_allclose(twice[:3, 3], 2 * once[:3, 3], rtol=1e-5)
    np.testing.assert_allclose(twice[:3, :3], once[:3, :3], atol=1e-7)


def test_pixels_without_depth_do_not_count(walk):
    depth = walk.depth_m[0].numpy().copy()
    depth[:, ::2], depth[::3], depth[5] = 0, np.nan, np.inf
    levels = pictures(walk.images[0].numpy(), walk.K.numpy())
    fit = align(make_keyframe(levels, depth), keyframe_and_image(walk)[1], [np.eye(4)])
    angle, distance = errors(fit.T_camera_key, motion(walk, 0, 3), float(walk.depth_m[0].median()))
    assert angle < 0.5 and distance < 0.03
    assert make_keyframe(levels, np.zeros_like(depth)) is None


def test_large_images_are_aligned_at_a_size_that_costs_no_more():
    rgb = np.random.default_rng(0).integers(0, 256, (392, 518, 3), np.uint8)
    sizes = [p.brightness.shape for p in pictures(rgb, np.eye(3))]
    assert sizes == [(98, 129), (49, 64), (24, 32), (12, 16)]
    depth = np.arange(392)[:, None] + np.ones((1, 518))
    coarsest = make_keyframe(pictures(rgb, np.eye(3)), depth).levels[-1]
    rows = coarsest.points[2].reshape(12, 16)[:, 0] * np.median(depth)
    np.testing.assert_allclose(
        rows, 17 + 32 * np.arange(12), rtol=1e-5
    )  # the middle of its 32 rows


def predictions(walk, seed=0, depth_error=0.05):
    """Answers of a network that sees shapes nearly right, and its motion badly."""
    rng = np.random.default_rng(seed)
    truth = invert_se3(walk.T_world_camera[:1]) @ walk.T_world_camera
    for index, T in enumerate(truth.double().numpy()):
        off = np.eye(4)
        if index:
            off[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.06, 3)).as_matrix()
            off[:3, 3] = rng.normal(0, 0.15, 3)
        depth = walk.depth_m[index] * math.exp(rng.normal(0, depth_error))
        yield FramePrediction(
            index, index, torch.from_numpy(T @ off).float(), walk.K, walk.images[index], depth,
            torch.ones_like(depth), None, None, AS_IT_IS,
        )  # fmt: skip


def path_errors(walk, poses):
    truth = (invert_se3(walk.T_world_camera[:1]) @ walk.T_world_camera).numpy()
    both = [errors(a, b, 1) for a, b in zip(poses, truth)]
    return np.array(both).mean(0)


def test_a_refined_walk_is_many_times_nearer_to_the_truth(walk):
    stated = list(predictions(walk))
    refiner = PoseRefiner()
    refined = [refiner.refine(p) for p in stated]
    before = path_errors(walk, [p.T_world_camera.numpy() for p in stated])
    after = path_errors(walk, [p.T_world_camera.numpy() for p in refined])
    assert refiner.num_unaligned == 0
    assert (after < before / 4).all(), (before, after)
    assert all(a.depth is b.depth and a.stamp_ns == b.stamp_ns for a, b in zip(stated, refined))


def test_a_lens_that_is_guessed_anew_for_each_image_does_not_move_the_camera(walk):
    """Without camera_info every frame has its own intrinsics; only those of keyframes count."""
    plain, shaky = list(predictions(walk)), []
    for prediction in plain:
        K = prediction.K.clone()
        K[0, 0] *= 1 + 0.05 * math.sin(3.0 * prediction.index)
        K[1, 1] *= 1 + 0.05 * math.sin(3.0 * prediction.index)
        shaky.append(dataclasses.replace(prediction, K=K))
    one, other = PoseRefiner(), PoseRefiner()
    after = [
        path_errors(walk, [refiner.refine(p).T_world_camera.numpy() for p in stream])
        for refiner, stream in ((one, plain), (other, shaky))
    ]
    assert (after[1] < 3 * after[0] + 0.02).all(), after


def test_a_new_session_starts_anew_and_one_keyframe_is_all_that_is_kept(walk):
    refiner = PoseRefiner()
    first = [refiner.refine(p).T_world_camera for p in predictions(walk)]
    kept = {name: np.shape(value) for name, value in vars(refiner).items()}
    again = [refiner.refine(p).T_world_camera for p in predictions(walk)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert {name: np.shape(value) for name, value in vars(refiner).items()} == kept


def test_a_session_whose_first_image_is_lost_knows_nothing_of_the_one_before(walk):
    refiner, stated = PoseRefiner(), list(predictions(walk))
    for prediction in stated[:5]:
        refiner.refine(prediction)
    lost = dataclasses.replace(stated[0], T_world_camera=torch.full((4, 4), math.nan))
    assert refiner.refine(lost) is lost
    assert refiner.refine(stated[1]) is stated[1]
    fresh = PoseRefiner()
    fresh.refine(stated[1])
    for prediction in stated[2:8]:
        a, b = (r.refine(prediction).T_world_camera for r in (refiner, fresh))
        assert torch.equal(a, b)


def test_poses_stay_rigid_however_long_the_stream(walk):
    refiner, stated = PoseRefiner(), list(predictions(walk))
    there_and_back = [*range(1, 30), *range(28, 0, -1)] * 20
    refiner.refine(stated[0])
    for index, frame in enumerate(there_and_back, 1):
        T = refiner.refine(dataclasses.replace(stated[frame], index=index)).T_world_camera.double()
    torch.testing.assert_close(T[:3, :3] @ T[:3, :3].mT, torch.eye(3).double(), atol=1e-6, rtol=0)
    assert errors(T.numpy(), motion(walk, 1, 0), 1)[0] < 20  # it drifts, and does not run away


def test_where_images_do_not_agree_the_motion_is_the_networks(walk):
    """Noise in the middle of a walk: nothing is made up, and what follows is refined again."""
    stated = list(predictions(walk))
    noise = np.random.default_rng(1).integers(0, 256, (*SIZE_HW, 3), np.uint8)
    stated[15] = dataclasses.replace(stated[15], rgb=torch.from_numpy(noise))
    refiner = PoseRefiner()
    refined = [refiner.refine(p).T_world_camera.double() for p in stated]
    assert refiner.num_unaligned == 2  # the noise, and the image after it
    for index in (15, 16):
        a, b = (p.T_world_camera.double() for p in stated[index - 1 : index + 1])
        wanted = refined[index - 1] @ torch.linalg.inv(a) @ b
        torch.testing.assert_close(refined[index], wanted, atol=1e-5, rtol=0)
    true = motion(walk, 16, 29)
    moved = np.linalg.inv(refined[29].numpy()) @ refined[16].numpy()
    assert errors(moved, true, 1)[0] < 2


def test_what_is_black_or_not_finite_stays_as_the_network_says(walk):
    stated = list(predictions(walk))[:4]
    refiner = PoseRefiner()
    for nothing in ({'rgb': torch.zeros_like(walk.images[0])}, {'depth': torch.zeros(SIZE_HW)}):
        for before in (dataclasses.replace(p, **nothing) for p in stated):
            T = refiner.refine(before).T_world_camera
            torch.testing.assert_close(T, before.T_world_camera, atol=1e-5, rtol=0)
    lost = dataclasses.replace(stated[3], T_world_camera=torch.full((4, 4), math.nan))
    assert refiner.refine(lost) is lost


def test_points_move_with_their_camera(walk):
    refiner = PoseRefiner()
    for before in predictions(walk):
        camera_points = torch.rand(*SIZE_HW, 3)
        T = before.T_world_camera
        points = camera_points @ T[:3, :3].T + T[:3, 3]
        after = refiner.refine(dataclasses.replace(before, world_points=points))
        T = after.T_world_camera
        wanted = camera_points @ T[:3, :3].T + T[:3, 3]
        torch.testing.assert_close(after.world_points, wanted, atol=1e-5, rtol=1e-5)


def padded(prediction, rows=(10, 14), columns=(6, 2)):
    """The prediction of a camera image that lies in a white frame."""
    sides = (*columns, *rows)
    K = prediction.K.clone()
    K[:2, 2] += torch.tensor([columns[0], rows[0]])
    size = prediction.depth.shape[0] + sum(rows), prediction.depth.shape[1] + sum(columns)
    rgb = torch.nn.functional.pad(prediction.rgb.movedim(-1, 0), sides, value=255).movedim(0, -1)
    depth = torch.nn.functional.pad(prediction.depth, sides, value=1.0)
    geometry = ImageGeometry(SIZE_HW, size, (1.0, 1.0), (columns[0], rows[0]))
    return dataclasses.replace(prediction, K=K, rgb=rgb, depth=depth, geometry=geometry)


def test_a_padding_does_not_hold_the_camera(walk):
    plain, framed = PoseRefiner(), PoseRefiner()
    for prediction in predictions(walk):
        T = plain.refine(prediction).T_world_camera
        assert torch.equal(framed.refine(padded(prediction)).T_world_camera, T)


def test_auto_refines_the_small_network_only():
    golden, tiny = golden_network('stream3r').config, load_model('tiny', 'random').config
    for kind, of_tiny, of_others in (
        ('auto', True, False),
        ('direct', True, True),
        ('none', False, False),
    ):
        config = RefinementConfig(kind=kind)
        assert (refines(tiny, config), refines(golden, config)) == (of_tiny, of_others)


@pytest.mark.parametrize('kind', ['none', 'direct'])
def test_a_reconstruction_has_the_poses_that_were_asked_for(walk, kind):
    model = load_model('tiny')
    config = CoreConfig(
        session=SessionConfig(mode='causal'), refinement=RefinementConfig(kind=kind)
    )
    session, refiner = make_session(model, config), PoseRefiner(config.refinement)
    made = Reconstructor(model, config)
    for image in walk.images[:6].numpy():
        wanted = session.step(image).to('cpu')
        if kind == 'direct':
            wanted = refiner.refine(wanted)
        assert torch.equal(made.process(image).T_world_camera, wanted.T_world_camera)
    assert made.figures() == ({'images_unaligned': 0} if kind == 'direct' else {})
