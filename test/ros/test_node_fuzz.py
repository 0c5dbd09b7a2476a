"""Whatever comes in over the graph, the node says no, stays alive, and takes the next image."""

import array

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import CAMERA_FRAME, HEIGHT, WIDTH
from sensor_msgs.msg import CameraInfo
from test_calibration import NUMBERS

pytestmark = pytest.mark.ros
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
KNOWN = {'rgb8', 'bgr8', 'rgba8', 'bgra8', 'mono8', 'mono16', '8UC1', '8UC3', 'nv12', 'nv21'}
TEXT = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=20)
HUGE = st.sampled_from([16384, 2**20, 2**32 - 1])
GROWTH_MB = 40  # of a process of 500: an image of 16k x 16k has 800

# Each spoils an image in one way, whatever else is drawn.
DAMAGE = st.one_of(
    st.fixed_dictionaries({'step': st.integers(0, 3 * WIDTH - 1)}),
    st.fixed_dictionaries({'data': st.binary(max_size=3 * WIDTH * (HEIGHT - 1))}),
    st.fixed_dictionaries({'width': st.just(0), 'height': st.integers(0, 2**32 - 1)}),
    st.fixed_dictionaries({'width': HUGE, 'height': HUGE, 'data': st.binary(max_size=9)}),
    st.fixed_dictionaries({'width': HUGE, 'step': HUGE}),
    st.fixed_dictionaries({'encoding': TEXT.filter(lambda name: name not in KNOWN)}),
    st.fixed_dictionaries({'encoding': st.sampled_from(['32FC1', '16UC1', 'jpeg', 'RGB8'])}),
    st.fixed_dictionaries({'nanosec': st.integers(10**9, 2**32 - 1)}),
    st.fixed_dictionaries({'sec': st.integers(-(2**31), 0)}),
    st.fixed_dictionaries({'sec': st.sampled_from([10**6, 10**9, 2**31 - 1])}),
    st.fixed_dictionaries({'frame_id': st.sampled_from(['', 'map', '/camera'])}),
)


def spoil(image, damage):
    """Set fields of an image, of its header and of its stamp."""
    for name, value in damage.items():
        owners = (image, image.header, image.header.stamp)
        owner = next(owner for owner in owners if hasattr(owner, name))
        setattr(owner, name, array.array('B', value) if name == 'data' else value)
    return image


def dealt_with(live):
    """How many images have been processed or dropped."""
    return (live.figure('images_processed') or 0) + (live.figure('images_dropped') or 0)


def send(live, image):
    """Send an image and wait until the node has dealt with it."""
    live.send(image, lambda: dealt_with(live))


def test_no_image_message_ends_the_node_or_its_session(live):
    live.start(**{'outputs.path.max_rate_hz': 0})
    live.connect_camera()
    live.feed(0)
    live.wait_until(lambda: live.figure('images_processed') == 1)
    # While it connected, one empty image may have superseded another: only what is new counts.
    dropped, rejected = live.figure('images_dropped'), live.figure('images_dropped.rejected')
    memory = psutil.Process(live.process.pid).memory_info
    before_mb, num_sent = memory().rss / 1e6, 0

    @FEW
    @given(DAMAGE)
    def attack(damage):
        nonlocal num_sent
        num_sent += 1
        send(live, spoil(live.image(num_sent), damage))

    attack()
    live.feed(num_sent + 1)
    live.wait_until(lambda: live.figure('images_processed') == 2)
    assert live.figure('images_dropped.rejected') == rejected + num_sent
    assert live.figure('images_dropped') == dropped + num_sent
    assert live.figure('restarts') == 0
    live.wait_for_path(0, num_sent + 1)
    assert memory().rss / 1e6 < before_mb + GROWTH_MB
    assert 'Traceback' not in live.log
    assert 1 <= live.log.count('image rejected') < num_sent  # throttled


def test_no_camera_info_stops_the_images(live, node):
    live.start()
    live.connect_camera()
    infos = node.create_publisher(CameraInfo, '/camera_info', 10)
    live.wait_until(infos.get_subscription_count)
    num_sent = 0

    @FEW
    @given(
        k=st.lists(NUMBERS | st.floats(1, 1000), min_size=9, max_size=9),
        d=st.lists(NUMBERS | st.floats(-1, 1), max_size=15),
        model=st.sampled_from(['plumb_bob', 'rational_polynomial', 'equidistant']) | TEXT,
        size=st.sampled_from([(HEIGHT, WIDTH), (0, 0), (2**32 - 1, 2**32 - 1)]),
    )
    def attack(k, d, model, size):
        nonlocal num_sent
        info = CameraInfo(k=k, d=d, distortion_model=model, height=size[0], width=size[1])
        info.header.frame_id = CAMERA_FRAME
        infos.publish(info)
        live.feed(num_sent)
        num_sent += 1

    attack()
    live.wait_until(lambda: live.figure('images_processed') == num_sent)
    assert live.figure('state') == 'active' and 'Traceback' not in live.log
    assert live.log.count('field of view is used') < num_sent
