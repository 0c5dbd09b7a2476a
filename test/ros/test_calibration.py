"""Rectified images obey their K: straight lines are straight, points land where K says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream3r_core.errors import InputError
from stream3r_core.synthetic.render import camera_rays
from stream3r_ros.calibration import Calibrator
from stream3r_ros.conversions import PINHOLE, Lens
from stream3r_ros.messages import rosbags_messages

HEIGHT, WIDTH = 240, 320
K = np.array([[210.0, 0, 163], [0, 205, 115], [0, 0, 1]])
LENSES = {
    'plumb_bob': [-0.25, 0.07, 0.002, -0.001, -0.01],
    'rational_polynomial': [0.4, -0.2, 0.001, 0.001, 0.05, 0.7, -0.15, 0.02],
    'equidistant': [-0.02, 0.008, -0.003, 0.0005],
}


def camera_info(model, d, K=K, height=HEIGHT, width=WIDTH):
    info = rosbags_messages().camera_info(K, height, width, 0, 'camera')
    info.distortion_model, info.d = model, np.array(d, float)
    return info


def pinhole_lens(x, y, k1=0, k2=0, p1=0, p2=0, k3=0, k4=0, k5=0, k6=0):
    """Brown's model, with the denominator of the rational one."""
    r2 = x * x + y * y
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )


def fisheye_lens(x, y, k1, k2, k3, k4):
    """Kannala and Brandt's odd polynomial of the angle to the optical axis."""
    r = np.hypot(x, y)
    angle = np.arctan(r)
    bent = angle * (1 + k1 * angle**2 + k2 * angle**4 + k3 * angle**6 + k4 * angle**8)
    return x * bent / r, y * bent / r


def seen_at(model, x, y):
    """Pixel at which the camera of this lens sees the direction (x, y, 1)."""
    lens = fisheye_lens if model == 'equidistant' else pinhole_lens
    x, y = lens(x, y, *LENSES[model])
    return K[0, 0] * x + K[0, 2], K[1, 1] * y + K[1, 2]


def dot(u, v, sigma=2.0):
    """An image with one soft white dot around the pixel (u, v)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    grey = 255 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2))
    return grey.astype(np.uint8)[..., None].repeat(3, 2)


def centre_of(image):
    weight = image[..., 0].astype(float)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


@pytest.mark.parametrize('model', LENSES)
@pytest.mark.parametrize('direction', [(0.01, 0.02), (-0.45, 0.3), (0.5, -0.35), (0.0, 0.4)])
def test_a_point_lands_where_the_rectified_intrinsics_say(model, direction):
    image = dot(*seen_at(model, *direction))
    rectified, K_rectified, lens = Calibrator()(image, camera_info(model, LENSES[model]))
    expected = K_rectified @ [*direction, 1]
    np.testing.assert_allclose(centre_of(rectified), expected[:2], atol=0.2)
    assert lens == PINHOLE


def bend(image):
    """How far, in pixels, a dark line in a white image deviates from straight: worst row."""
    weight = 255.0 - image[..., 0]
    rows = np.flatnonzero(weight.sum(1) > 300)
    columns = (weight[rows] * np.arange(WIDTH)).sum(1) / weight[rows].sum(1)
    return np.abs(columns - np.polyval(np.polyfit(rows, columns, 1), rows)).max()


def test_straight_lines_of_a_distorted_rendering_become_straight():
    distortion = (-0.3, 0.08)
    x, y, _ = camera_rays(torch.tensor(K[None]).float(), HEIGHT, WIDTH, distortion)[0].T.numpy()
    distance_px = K[0, 0] * np.abs(x - 0.1 * y - 0.5).reshape(HEIGHT, WIDTH)
    image = (255 * np.clip(distance_px / 3, 0, 1)).astype(np.uint8)[..., None].repeat(3, 2)
    calibrated = Calibrator()(image, camera_info('plumb_bob', [*distortion, 0, 0, 0]))
    assert bend(image) > 3
    assert bend(calibrated.image) < 0.3


@pytest.mark.parametrize('model', LENSES)
def test_a_rectified_image_has_no_margin_and_loses_little(model):
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    rectified, K_rectified, _ = Calibrator()(image, camera_info(model, LENSES[model]))
    assert rectified.shape == image.shape and (rectified == 255).all()
    border = (np.array([0, WIDTH - 1]) - K_rectified[0, 2]) / K_rectified[0, 0]
    u, _ = seen_at(model, border[[0, 1]], np.zeros(2))
    assert u[1] - u[0] > 0.8 * WIDTH


def test_without_distortion_the_image_itself_comes_back():
    image = dot(50, 60)
    for info in (camera_info('plumb_bob', np.zeros(5)), camera_info('', [])):
        calibrated = Calibrator()(image, info)
        assert calibrated.image is image and calibrated.lens == PINHOLE
        np.testing.assert_array_equal(calibrated.K, K)


@pytest.mark.parametrize(('model', 'd'), [*LENSES.items(), ('of my own', [1.0])])
def test_never_leaves_the_image_and_says_what_distortion_it_has(model, d):
    image = dot(50, 60)
    calibrated = Calibrator('never')(image, camera_info(model, d))
    assert calibrated.image is image and calibrated.lens == Lens(model, tuple(d))
    np.testing.assert_array_equal(calibrated.K, K)


def test_never_refuses_a_distortion_that_is_no_number():
    with pytest.raises(InputError, match='not finite'):
        Calibrator('never')(dot(50, 60), camera_info('plumb_bob', [0.1, np.nan, 0, 0, 0]))


def test_another_calibration_takes_effect_and_the_first_one_again():
    image, calibrate = dot(50, 60), Calibrator()
    infos = [camera_info(model, LENSES[model]) for model in ('plumb_bob', 'equidistant')]
    alone = [Calibrator()(image, info) for info in infos]
    for which in (0, 0, 1, 0):
        calibrated = calibrate(image, infos[which])
        np.testing.assert_array_equal(calibrated.image, alone[which].image)
        np.testing.assert_array_equal(calibrated.K, alone[which].K)


@pytest.mark.parametrize(
    ('info', 'message'),
    [
        (camera_info('thin_prism', [0.1]), "'thin_prism' is not supported"),
        (camera_info('equidistant', [0.1] * 5), 'equidistant takes .* got 5'),
        (camera_info('plumb_bob', [np.nan] * 5), 'not finite'),
        (camera_info('plumb_bob', [-1e9, 0, 0, 0, 0]), 'leaves nothing'),
        (camera_info('plumb_bob', [0.1] * 5, height=HEIGHT + 1), '320 x 241 pixels'),
    ],
)
def test_what_cannot_be_undone_is_refused_and_the_next_one_works(info, message):
    image, calibrate = dot(50, 60), Calibrator()
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            calibrate(image, info)
    calibrate(image, camera_info('plumb_bob', LENSES['plumb_bob']))


BINNED = {'binning_x': 2, 'binning_y': 3}


def windowed(info, x_offset=0, y_offset=0, height=0, width=0, **binning):
    """The same camera, of which images show a part, several pixels as one."""
    info.roi.x_offset, info.roi.y_offset = x_offset, y_offset
    info.roi.height, info.roi.width = height, width
    for name, value in binning.items():
        setattr(info, name, value)
    return info


@pytest.mark.parametrize(
    ('window', 'size_hw'),
    [
        ({}, (HEIGHT, WIDTH)),
        ({'x_offset': 40, 'y_offset': 30, 'height': 120, 'width': 200}, (120, 200)),
        (BINNED, (80, 160)),
        ({'x_offset': 40, 'y_offset': 30, 'height': 121, 'width': 200, **BINNED}, (40, 100)),
    ],
)
@pytest.mark.parametrize('model', ['', 'plumb_bob', 'equidistant'])
def test_intrinsics_hold_for_the_window_that_images_show(model, window, size_hw):
    """A point of the scene lands where K says, in an image cut out of the sensor's and binned."""
    direction = (0.05, 0.1)
    u, v = seen_at(model, *direction) if model else (K @ [*direction, 1])[:2]
    offset = np.array([window.get('x_offset', 0), window.get('y_offset', 0)])
    bins = np.array([window.get('binning_x', 1), window.get('binning_y', 1)])
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    seen = ([u, v] - offset) / bins
    grey = 255 * np.exp(-((columns - seen[0]) ** 2 + (rows - seen[1]) ** 2) / 8)
    info = windowed(camera_info(model, LENSES.get(model, [])), **window)
    image, K_image, _ = Calibrator()(grey.astype(np.uint8)[..., None].repeat(3, 2), info)
    weight = image[..., 0].astype(float)
    centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    np.testing.assert_allclose(centre, (K_image @ [*direction, 1])[:2], atol=0.2)


@pytest.mark.parametrize(
    'window', [{'x_offset': WIDTH}, {'x_offset': 300, 'height': 10, 'width': 30}]
)
def test_a_window_that_does_not_lie_in_the_sensor_is_refused(window):
    with pytest.raises(InputError, match='region of interest'):
        Calibrator()(dot(5, 5), windowed(camera_info('', []), **window))


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(['plumb_bob', 'rational_polynomial', 'equidistant', 'unheard of']),
    d=st.lists(NUMBERS | st.floats(-1, 1), max_size=15),
    k=st.lists(NUMBERS | st.floats(1, 1000), min_size=9, max_size=9),
)
def test_whatever_a_calibration_says_it_gives_an_image_or_a_refusal(model, d, k):
    image = np.full((30, 40, 3), 255, np.uint8)
    info = camera_info(model, d, np.reshape(k, (3, 3)), 30, 40)
    try:
        calibrated = Calibrator()(image, info)
    except InputError:
        return
    assert (calibrated.image == 255).all()
    assert np.isfinite(calibrated.K).all()
