"""The metric scale: right from any resolution, robust, calm, and none where nothing says it."""

import dataclasses

import numpy as np
import pytest
import torch
from test_tracking import prediction

from stream3r_core.config import ImageConfig, ModelConfig
from stream3r_core.errors import ConfigError, InputError
from stream3r_core.image import prepare
from stream3r_ros.config import NodeConfig, ScaleConfig
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.scale import BaselineScale, DepthScale, ScaleTracker, depth_ratio
from stream3r_ros.tf import check_frames
from stream3r_ros.transforms import TransformBuffer

HEIGHT, WIDTH = 120, 160
TRUE_SCALE = 2.5
CONFIG = ScaleConfig(source='depth')
STAMP = 1_700_000_000_000_000_000


def scene(height, width):
    """A true depth [h, w], metres, that is the same picture at any resolution."""
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    return (1.5 + 2.0 * x + y[:, None]).astype(np.float32)


def predicted(fit='crop', height=HEIGHT, width=WIDTH):
    """A prediction of that scene in other units, through the real resize and crop."""
    image = np.zeros((height, width, 3), np.uint8)
    model = ModelConfig(img_size=96, patch_size=8, encoder='conv', embed_dim=192, num_heads=3)
    tensor, geometry = prepare(image, ImageConfig(fit=fit), model)
    rows, columns = tensor.shape[1:]
    v, u = ((np.arange(n) + 0.5 - o) / s for n, o, s in zip(
        (rows, columns), geometry.offset_xy[::-1], geometry.scale_xy[::-1]))  # fmt: skip
    depth_m = 1.5 + 2.0 * u / width + (v / height)[:, None]
    return dataclasses.replace(
        prediction(),
        stamp_ns=STAMP,
        depth=torch.from_numpy(depth_m / TRUE_SCALE).float(),
        geometry=geometry,
    )


@pytest.mark.parametrize('fit', ['crop', 'pad'])
@pytest.mark.parametrize('shape', [(HEIGHT, WIDTH), (160, 120), (90, 300)])
@pytest.mark.parametrize('resolution', [0.5, 1, 2])
def test_the_ratio_is_right_through_resize_crop_and_padding(fit, shape, resolution):
    height, width = (int(side * resolution) for side in shape)
    ratio = depth_ratio(predicted(fit, *shape), scene(height, width))
    assert ratio == pytest.approx(TRUE_SCALE, rel=0.01)


def test_outliers_and_holes_do_not_count():
    depth_m = scene(HEIGHT, WIDTH)
    rng = np.random.default_rng(0)
    depth_m[rng.random(depth_m.shape) < 0.3] = 60.0
    depth_m[rng.random(depth_m.shape) < 0.3] = 0.1
    depth_m[rng.random(depth_m.shape) < 0.3] = np.nan
    assert depth_ratio(predicted(), depth_m) == pytest.approx(TRUE_SCALE, rel=0.2)
    assert depth_ratio(predicted(), np.full_like(depth_m, np.nan)) is None


def depth_message(stamp=STAMP, frame='camera'):
    return rosbags_messages().float_image(scene(60, 80), stamp, frame)


def test_the_depth_image_of_the_same_time_is_taken_and_no_other():
    depth = DepthScale(TransformBuffer())
    assert depth.ratio(predicted(), 'camera', CONFIG) is None
    depth.add(depth_message(STAMP + 30_000_000))
    assert depth.ratio(predicted(), 'camera', CONFIG) is None
    depth.add(depth_message(STAMP - 10_000_000))
    assert depth.ratio(predicted(), 'camera', CONFIG) == pytest.approx(TRUE_SCALE, rel=0.01)


def test_depth_of_another_camera_is_refused_without_its_calibration():
    depth = DepthScale(TransformBuffer())
    depth.add(depth_message(frame='depth_camera'))
    with pytest.raises(InputError, match='registered'):
        depth.ratio(predicted(), 'camera', CONFIG)


def tracked(ratios, **options):
    tracker, values = ScaleTracker(), []
    for ratio in ratios:
        tracker.add(ratio, dataclasses.replace(CONFIG, **options))
        values.append(tracker.value)
    return values


def test_the_scale_is_arbitrary_until_enough_is_known():
    assert tracked([2.0, np.nan, 0.0, 2.0, 2.0], min_ratios=3) == [None] * 4 + [pytest.approx(2.0)]


def test_the_scale_is_calm_under_noise_and_outliers():
    rng = np.random.default_rng(0)
    ratios = 2.0 * np.exp(0.05 * rng.standard_normal(300))
    ratios[::7] = 50.0
    values = tracked(ratios, dead_band=0.03)[30:]
    np.testing.assert_allclose(values, 2.0, rtol=0.1)
    assert len(set(values)) < 20


def test_the_scale_follows_a_drift():
    values = tracked(np.linspace(1.0, 2.0, 400), window=30, dead_band=0.01)
    assert values[-1] == pytest.approx(2.0, rel=0.06)


def test_the_baseline_of_an_odometry_gives_the_scale():
    baseline, ratios = BaselineScale(), []
    rng = np.random.default_rng(1)
    T_odom = np.eye(4)
    for step in range(200):
        T_world = np.eye(4)
        T_odom[:3, 3] = 0.02 * step, np.sin(0.02 * step), 0.1
        T_world[:3, 3] = T_odom[[2, 0, 1], 3] / TRUE_SCALE + 0.002 * rng.standard_normal(3)
        ratios.append(baseline.ratio(T_world, T_odom, CONFIG))
    found = [ratio for ratio in ratios if ratio is not None]
    assert len(found) > 10
    np.testing.assert_allclose(found, TRUE_SCALE, rtol=0.1)
    assert baseline.ratio(T_world, T_odom, CONFIG) is None  # it stands


def test_odometry_needs_its_frame():
    with pytest.raises(ConfigError, match='odom_frame'):
        check_frames(NodeConfig(scale=ScaleConfig(source='odometry')))
