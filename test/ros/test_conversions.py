"""Messages to arrays: every encoding gives the picture back, a broken message an InputError."""

import array
import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from stream3r_core.errors import InputError
from stream3r_ros.conversions import (
    camera_matrix,
    depth_from_message,
    image_from_message,
    stamp_ns,
)
from stream3r_ros.messages import rclpy_messages, rosbags_messages

HEIGHT, WIDTH = 6, 8
RGB = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
FLAT = np.broadcast_to(np.uint8([200, 40, 90]), (HEIGHT, WIDTH, 3))
GREY = RGB[..., 1]


ROSBAGS = rosbags_messages()
LIBRARIES = ['rosbags', pytest.param('rclpy', marks=pytest.mark.ros)]


def image(encoding='rgb8', rows=RGB, is_bigendian=False, padding=0, library='rosbags', **changes):
    """Build a real image message of either library from the rows of the picture."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    data = np.pad(raw, ((0, 0), (0, padding)), constant_values=77)
    messages = ROSBAGS if library == 'rosbags' else rclpy_messages()
    fields = {
        'header': messages.header(0, 'camera'),
        'encoding': encoding,
        'height': HEIGHT,
        'width': WIDTH,
        'step': data.shape[1],
        'is_bigendian': int(is_bigendian),
        'data': data.ravel() if library == 'rosbags' else array.array('B', data.tobytes()),
    }
    return messages.make('sensor_msgs/msg/Image', **{**fields, **changes})


def rgb_of_grey(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def with_alpha(pixels):
    return np.concatenate([pixels, np.full((HEIGHT, WIDTH, 1), 9, np.uint8)], axis=2)


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(
    'encoding, rows, expected',
    [
        ('rgb8', RGB, RGB),
        ('bgr8', RGB[..., ::-1], RGB),
        ('rgba8', with_alpha(RGB), RGB),
        ('bgra8', with_alpha(RGB[..., ::-1]), RGB),
        ('8UC3', RGB[..., ::-1], RGB),
        ('mono8', GREY, rgb_of_grey(GREY)),
        ('8UC1', GREY, rgb_of_grey(GREY)),
    ],
)
def test_packed_encodings_give_the_picture_back(encoding, rows, expected, padding, library):
    decoded = image_from_message(image(encoding, rows, padding=padding, library=library))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize('order', ['<', '>'])
def test_mono16_keeps_the_high_byte_in_either_byte_order(order):
    wide = (GREY.astype(np.uint16) * 256 + 17).astype(order + 'u2')
    decoded = image_from_message(image('mono16', wide, is_bigendian=order == '>', padding=3))
    np.testing.assert_array_equal(decoded, rgb_of_grey(GREY))


@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_a_bayer_mosaic_of_a_flat_colour_gives_that_colour(pattern):
    mosaic = np.empty((HEIGHT, WIDTH), np.uint8)
    for position, letter in enumerate(pattern):
        mosaic[position // 2 :: 2, position % 2 :: 2] = FLAT[0, 0, 'rgb'.index(letter)]
    decoded = image_from_message(image(f'bayer_{pattern}8', mosaic, padding=4))
    np.testing.assert_array_equal(decoded, FLAT)


def studio_range_yuv(rgb):
    """Return BT.601 luma and chroma planes of an rgb picture, 8-bit studio range."""
    r, g, b = (rgb[..., c].astype(float) for c in range(3))
    luma = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
    v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
    return [np.rint(plane).astype(np.uint8) for plane in (luma, u, v)]


@pytest.mark.parametrize('encoding', ['yuv422', 'uyvy', 'yuv422_yuy2', 'yuyv', 'nv12', 'nv21'])
def test_yuv_of_a_flat_colour_gives_that_colour(encoding):
    luma, u, v = studio_range_yuv(FLAT)
    chroma = np.where(np.arange(WIDTH) % 2 == 0, u, v)
    if encoding in ('yuv422', 'uyvy'):
        rows = np.stack([chroma, luma], axis=2)
    elif encoding in ('yuv422_yuy2', 'yuyv'):
        rows = np.stack([luma, chroma], axis=2)
    else:
        swapped = np.where(np.arange(WIDTH) % 2 == 0, v, u)
        rows = np.concatenate([luma, (chroma if encoding == 'nv12' else swapped)[: HEIGHT // 2]])
    decoded = image_from_message(image(encoding, rows, padding=6))
    assert np.abs(decoded.astype(int) - FLAT).max() <= 3


def test_the_last_row_may_come_without_its_padding():
    message = image('rgb8', RGB, padding=5)
    message.data = message.data[:-5]
    np.testing.assert_array_equal(image_from_message(message), RGB)


def test_a_decoded_image_does_not_share_memory_with_its_message():
    message = image('rgb8', RGB)
    decoded = image_from_message(message)
    decoded[:] = 0
    np.testing.assert_array_equal(message.data.reshape(RGB.shape), RGB)


def compressed(data, format='jpeg'):
    return ROSBAGS.compressed_image(data, format, 0, 'camera')


def test_a_png_gives_the_picture_back_exactly_and_a_jpeg_nearly():
    smooth = cv2.resize(FLAT // 2 + RGB[:1, :1] // 4, (64, 48))
    png = cv2.imencode('.png', smooth[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(image_from_message(compressed(png, 'png')), smooth)
    jpeg = cv2.imencode('.jpg', smooth[..., ::-1])[1].tobytes()
    decoded = image_from_message(compressed(jpeg, 'rgb8; jpeg compressed bgr8'))
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


def test_a_16_bit_grey_png_keeps_the_high_byte():
    png = cv2.imencode('.png', GREY.astype(np.uint16) * 256 + 200)[1].tobytes()
    np.testing.assert_array_equal(
        image_from_message(compressed(png, 'mono16; png compressed')), rgb_of_grey(GREY)
    )


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
@pytest.mark.parametrize('kept', [0, 1, 20, 0.5, 0.9])
def test_a_truncated_jpeg_or_png_is_refused_whole(suffix, kept):
    data = cv2.imencode(suffix, np.tile(RGB, (8, 8, 1)))[1].tobytes()
    kept = kept if isinstance(kept, int) else int(kept * len(data))
    with pytest.raises(InputError, match='jpeg or png'):
        image_from_message(compressed(data[:kept]))


def test_a_picture_that_claims_an_absurd_size_is_refused_before_decoding():
    buffer = io.BytesIO()
    PilImage.new('1', (16384, 16384)).save(buffer, 'PNG')
    with pytest.raises(InputError):
        image_from_message(compressed(buffer.getvalue(), 'png'))


@pytest.mark.parametrize(
    'changes, complaint',
    [
        ({'encoding': 'rgb9'}, "'rgb9' is not supported; known: rgb8, bgr8"),
        ({'step': WIDTH * 3 - 1}, 'step must be at least 24 bytes, got 23'),
        ({'step': WIDTH * 3 + 1}, 'expected 150 bytes, got 144'),
        ({'data': np.zeros(10, np.uint8)}, 'expected 144 bytes, got 10'),
        ({'data': np.zeros(0, np.uint8)}, 'expected 144 bytes, got 0'),
        ({'data': np.zeros(145, np.uint8)}, 'expected 144 bytes, got 145'),
        ({'width': 0}, 'must be positive, got 0 x 6'),
        ({'height': 0, 'data': np.zeros(0, np.uint8)}, 'must be positive, got 8 x 0'),
        ({'width': 16384, 'height': 16384, 'step': 3 * 16384}, '16384 x 16384: more than'),
        ({'width': 2**32 - 1, 'height': 2**32 - 1, 'step': 2**32 - 1}, 'more than'),
        ({'encoding': 'nv12', 'height': 5}, 'must be even'),
        ({'encoding': 'yuv422', 'width': 7}, 'must be even'),
    ],
)
def test_an_image_that_is_not_what_it_claims_is_refused_with_numbers(changes, complaint):
    with pytest.raises(InputError, match=complaint):
        image_from_message(image(**changes))


ENCODINGS = st.sampled_from(
    'rgb8 bgra8 mono8 mono16 bayer_rggb8 yuv422 nv21 8UC3 16UC1 32FC1 unknown'.split()
)
SIZES = st.one_of(st.integers(0, 12), st.sampled_from([16384, 2**32 - 1]))


@settings(deadline=None, derandomize=True)
@given(
    encoding=ENCODINGS,
    height=SIZES,
    width=SIZES,
    step=st.one_of(st.integers(0, 60), st.just(2**32 - 1)),
    is_bigendian=st.integers(0, 255),
    data=st.binary(max_size=600),
)
def test_any_raw_image_message_is_decoded_or_refused(
    encoding, height, width, step, is_bigendian, data
):
    message = image(
        encoding=encoding,
        height=height,
        width=width,
        step=step,
        is_bigendian=is_bigendian,
        data=np.frombuffer(data, np.uint8),
    )
    for convert, tail in ((image_from_message, (3,)), (depth_from_message, ())):
        try:
            assert convert(message).shape == (height, width, *tail)
        except InputError as error:
            assert str(error)


JPEG, PNG = (cv2.imencode(s, np.tile(RGB, (3, 3, 1)))[1].tobytes() for s in ('.jpg', '.png'))


@settings(deadline=None, derandomize=True)
@given(
    source=st.sampled_from([JPEG, PNG]),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 2000),
)
def test_any_damage_to_a_compressed_image_is_decoded_or_refused(source, edits, cut):
    data = bytearray(source)
    for position, value in edits:
        data[position % len(data)] = value
    try:
        assert image_from_message(compressed(bytes(data[: max(cut, 1)]))).dtype == np.uint8
    except InputError as error:
        assert str(error)


@pytest.mark.parametrize('order', ['<', '>'])
def test_depth_in_millimetres_and_metres_agree_and_mark_the_invalid(order):
    millimetres = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # 0 = invalid
    expected = np.where(millimetres == 0, np.nan, millimetres / 1000).astype(np.float32)
    big = order == '>'
    raw = image('16UC1', millimetres.astype(order + 'u2'), is_bigendian=big, padding=2)
    np.testing.assert_allclose(depth_from_message(raw), expected)
    metres = image('32FC1', (millimetres / 1000).astype(order + 'f4'), is_bigendian=big, padding=4)
    np.testing.assert_allclose(depth_from_message(metres), expected)


def test_depth_that_is_not_a_positive_number_becomes_nan():
    rows = np.full((HEIGHT, WIDTH), 2, np.float32)
    rows[0, :4] = [np.inf, -np.inf, -1, np.nan]
    depth = depth_from_message(image('32FC1', rows))
    assert np.isnan(depth[0, :4]).all() and (depth[1:] == 2).all()


@pytest.mark.parametrize('message', [image('rgb8', RGB), compressed(PNG)])
def test_a_colour_image_is_no_depth_image(message):
    with pytest.raises(InputError, match='known: 16UC1, 32FC1'):
        depth_from_message(message)


@pytest.mark.parametrize('library', LIBRARIES)
def test_stamps_stay_exact_integers(library):
    message = image(library=library)
    message.header.stamp.sec, message.header.stamp.nanosec = 1_700_000_000, 123_456_789
    stamps = {stamp_ns(message), stamp_ns(message.header), stamp_ns(message.header.stamp)}
    assert stamps == {1_700_000_000_123_456_789}


def test_a_stamp_with_too_many_nanoseconds_is_refused():
    with pytest.raises(InputError, match='got 1000000000'):
        stamp_ns(ROSBAGS.make('builtin_interfaces/msg/Time', sec=0, nanosec=10**9))


def camera_info(k):
    return ROSBAGS.camera_info(np.reshape(k, (3, 3)), HEIGHT, WIDTH, 0, 'camera')


def test_the_camera_matrix_is_read_row_by_row():
    K = camera_matrix(camera_info([500, 0, 320, 0, 510, 240, 0, 0, 1]))
    np.testing.assert_array_equal(K, [[500, 0, 320], [0, 510, 240], [0, 0, 1]])


@pytest.mark.parametrize(
    'k, complaint',
    [
        ([0] * 9, 'not calibrated'),
        ([np.nan, 0, 1, 0, 1, 1, 0, 0, 1], 'finite'),
        ([-5, 0, 1, 0, 1, 1, 0, 0, 1], 'fx, fy > 0'),
        ([5, 0, 1, 0, 5, 1, 0, 0, 0], '0 0 1'),
        ([5, 0, 1, 3, 5, 1, 0, 0, 1], '0 0 1'),
    ],
)
def test_a_useless_camera_matrix_is_refused(k, complaint):
    with pytest.raises(InputError, match=complaint):
        camera_matrix(camera_info(k))
