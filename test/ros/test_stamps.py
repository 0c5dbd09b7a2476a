"""What a stamp says about its image, in node and replay alike."""

import pytest

from stream3r_core.errors import InputError
from stream3r_ros.stamps import StampOrder

S = 10**9
START = 1_700_000_000 * S


@pytest.fixture
def order():
    order = StampOrder()
    assert order.check(START, 0.5) == 0
    order.note(START)
    return order


def test_images_go_on_pause_and_jump_back(order):
    assert order.check(START + 1, 0.5) == pytest.approx(1e-9)
    assert order.check(START + 60 * S, 0.5) == 60
    assert order.check(START - S // 2, 0.5) == -0.5


@pytest.mark.parametrize('late_ns', [0, 1, S // 2 - 1])
def test_repeated_and_late_images_are_refused(order, late_ns):
    with pytest.raises(InputError):
        order.check(START - late_ns, 0.5)


@pytest.mark.parametrize('leap_s', [10**6, -(10**6)])
def test_a_leap_needs_a_second_image(order, leap_s):
    stray = START + leap_s * S
    with pytest.raises(InputError, match='confirm'):
        order.check(stray, 0.5)
    with pytest.raises(InputError, match='confirm'):  # the same stamp once more is no second image
        order.check(stray, 0.5)
    assert order.check(START + S, 0.5) == 1  # and the session goes on
    with pytest.raises(InputError, match='confirm'):
        order.check(stray, 0.5)
    assert order.check(stray + S, 0.5) == pytest.approx(leap_s + 1)


def test_after_a_reset_any_stamp_is_the_first_that_was_not_the_last(order):
    order.reset()
    with pytest.raises(InputError, match='the one before'):  # its transform is on the graph
        order.check(START, 0.5)
    assert order.check(1, 0.5) == 0
