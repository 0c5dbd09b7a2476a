"""Images that never came: gaps in the numbers of one publisher, and what DDS says."""

from stream3r_ros.losses import LossCounter


def lost(numbers, noticed=0, publishers=lambda: {'camera'}):
    """What is counted when images with these numbers arrive, and DDS has noticed some."""
    counter = LossCounter(publishers)
    for number in numbers:
        counter.arrived(number)
    counter.noticed(noticed)
    return counter.by_reason


def test_gaps_are_losses_and_what_dds_noticed_is_told_apart():
    assert lost([7, 8, 9]) == {}  # what was sent before we listened is no loss
    assert lost([1, 2, 6, 7, 10]) == {'unread': 5}
    assert lost([1, 2, 6, 7, 10], noticed=4) == {'transport': 4, 'unread': 1}
    assert lost([1, 2], noticed=3) == {'transport': 3}


def test_without_numbers_dds_alone_is_believed():
    assert lost([None, None]) == {} and lost([None], noticed=2) == {'transport': 2}


def test_another_publisher_begins_a_count_of_its_own():
    asked = iter([{'a'}, {'b'}, {'c'}, {'c'}])  # at 1, 90, 1 and 5
    assert lost([1, 2, 90, 91, 1, 2, 5], publishers=lambda: next(asked)) == {'unread': 2}
    assert lost([1, 500, 2, 501, 3], publishers=lambda: {'left', 'right'}) == {}
