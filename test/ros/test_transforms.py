"""The buffer of transforms: chains, interpolation, no value where there is none, bounded."""

import threading

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stream3r_core.errors import ConfigError, InputError
from stream3r_ros.config import NodeConfig
from stream3r_ros.messages import rosbags_messages
from stream3r_ros.tf import T_level_camera, T_map_of_first_camera, check_frames, upright_map
from stream3r_ros.transforms import MAX_SAMPLES, TransformBuffer, TransformError

MESSAGES = rosbags_messages()
SECOND = 10**9
START = 1_700_000_000_123_456_789


def pose(x=0.0, y=0.0, z=0.0, rotvec=(0, 0, 0)):
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(rotvec).as_matrix()
    T[:3, 3] = x, y, z
    return T


def edge(parent, child, T, stamp=START):
    return MESSAGES.tf([MESSAGES.transform(T, stamp, parent, child)])


def moving(t_s):
    """T_odom_base of a robot that drives and turns evenly."""
    return pose(x=2.0 * t_s, y=-t_s, rotvec=(0, 0, 0.3 * t_s))


@pytest.fixture
def buffer():
    """A robot: map <- odom <- base <- camera, with another branch."""
    buffer = TransformBuffer()
    for tenth in range(21):
        stamp = START + tenth * SECOND // 10
        buffer.add(edge('odom', 'base', moving(tenth / 10), stamp))
    buffer.add(edge('base', 'mast', pose(z=1.0, rotvec=(0, 0.4, 0))), is_static=True)
    buffer.add(edge('mast', 'camera', pose(x=0.2, rotvec=(0.1, 0, 0))), is_static=True)
    buffer.add(edge('base', 'laser', pose(x=-0.5, rotvec=(0, 0, 3))), is_static=True)
    return buffer


@pytest.mark.parametrize('t_s', [0.0, 0.1, 0.55, 1.237, 2.0])
def test_a_chain_is_interpolated_at_the_stamp(buffer, t_s):
    mast, camera = pose(z=1.0, rotvec=(0, 0.4, 0)), pose(x=0.2, rotvec=(0.1, 0, 0))
    found = buffer.lookup('odom', 'camera', START + round(t_s * SECOND))
    np.testing.assert_allclose(found, moving(t_s) @ mast @ camera, atol=1e-12)


def test_frames_on_two_branches_and_downwards(buffer):
    stamp = START + SECOND // 3
    odom_camera, odom_laser = (buffer.lookup('odom', f, stamp) for f in ('camera', 'laser'))
    expected = np.linalg.inv(odom_laser) @ odom_camera
    np.testing.assert_allclose(buffer.lookup('laser', 'camera', stamp), expected, atol=1e-12)
    down = buffer.lookup('camera', 'odom', stamp)
    np.testing.assert_allclose(down, np.linalg.inv(odom_camera), atol=1e-12)
    np.testing.assert_array_equal(buffer.lookup('camera', 'camera', stamp), np.eye(4))


@pytest.mark.parametrize(
    ('frame', 'child', 'stamp', 'reason'),
    [
        ('odom', 'camera', START + 2 * SECOND + 1, 'older than the image'),
        ('odom', 'camera', START - 1, 'newer than the image'),
        ('odom', 'gripper', START, "'gripper' has no parent"),
        ('earth', 'camera', START, "'odom' has no parent, and 'earth' is not above it"),
    ],
)
def test_there_is_no_value_outside_of_what_is_known(buffer, frame, child, stamp, reason):
    with pytest.raises(TransformError, match=reason):
        buffer.lookup(frame, child, stamp)


def test_a_lookup_waits_for_a_transform_on_its_way(buffer):
    stamp = START + 2 * SECOND + SECOND // 20
    late = edge('odom', 'base', moving(2.1), START + 2 * SECOND + SECOND // 10)
    sender = threading.Thread(target=buffer.add, args=(late,))
    sender.start()
    found = buffer.lookup('odom', 'base', stamp, timeout_s=30)
    sender.join()
    np.testing.assert_allclose(found, moving(2.05), atol=1e-12)


def test_a_recording_that_loops_begins_anew(buffer):
    buffer.add(edge('odom', 'base', pose(x=7.0), START))
    np.testing.assert_array_equal(buffer.lookup('odom', 'base', START), pose(x=7.0))
    with pytest.raises(TransformError):
        buffer.lookup('odom', 'base', START + SECOND)


def test_transforms_in_disorder_are_put_in_order():
    buffer = TransformBuffer()
    for t_s in (0.0, 0.2, 0.1):
        buffer.add(edge('odom', 'base', moving(t_s), START + round(t_s * SECOND)))
    found = buffer.lookup('odom', 'base', START + SECOND // 20)
    np.testing.assert_allclose(found, moving(0.05), atol=1e-12)


def test_a_loop_of_frames_ends():
    buffer = TransformBuffer()
    for parent, child in (('a', 'b'), ('b', 'c'), ('c', 'a')):
        buffer.add(edge(parent, child, pose(x=1.0)))
    with pytest.raises(TransformError):
        buffer.lookup('elsewhere', 'a', START)


def test_memory_is_bounded_in_time_and_in_number():
    buffer = TransformBuffer()
    for index in range(MAX_SAMPLES + 100):
        buffer.add(edge('odom', 'base', pose(), START + index * 1000))
    assert len(buffer._edges['base']._samples) == MAX_SAMPLES
    buffer.add(edge('odom', 'base', pose(), START + 100 * SECOND))
    assert len(buffer._edges['base']._samples) == 1


@pytest.mark.parametrize('spoil', [{'x': np.nan}, {'w': 5.0}, {'w': 0.0}])
def test_what_is_no_rigid_transform_is_refused_and_the_rest_taken(spoil):
    message = edge('odom', 'base', pose())
    (bad,) = edge('a', 'b', pose()).transforms
    for axis, value in spoil.items():
        setattr(bad.transform.rotation, axis, value)
    message.transforms.insert(0, bad)
    buffer = TransformBuffer()
    with pytest.raises(InputError, match='not rigid'):
        buffer.add(message)
    buffer.lookup('odom', 'base', START)


@pytest.mark.parametrize('roll', [-0.5, 0.0, 0.3])
@pytest.mark.parametrize('pitch', [-1.2, 0.0, 0.6])
def test_a_level_map_has_gravity_where_the_attitude_says(roll, pitch):
    config = NodeConfig(map_orientation='level', camera_roll=roll, camera_pitch=pitch)
    T_map_world = T_map_of_first_camera(config)
    forward, right = T_map_world[:3, 2], T_map_world[:3, 0]
    assert forward[2] == pytest.approx(-np.sin(pitch))  # positive pitch looks down
    assert right[2] == pytest.approx(-np.sin(roll) * np.cos(pitch))  # positive roll: right down
    assert forward[1] == pytest.approx(0) and forward[0] > 0
    turned = pose(rotvec=(0, 0, 2)) @ T_map_world
    np.testing.assert_allclose(upright_map(turned), T_map_world, atol=1e-12)


@pytest.mark.parametrize(('pitch', 'above'), [(np.pi / 2, -1), (-np.pi / 2, 1)])
def test_a_camera_that_looks_straight_down_or_up_has_a_heading_too(pitch, above):
    turned = pose(rotvec=(0, 0, 1.0)) @ T_level_camera(0.0, pitch)
    T_map_world = upright_map(turned)
    np.testing.assert_allclose(T_map_world[:3, 2], [0, 0, above], atol=1e-12)
    np.testing.assert_allclose(T_map_world[:3, 1], [above, 0, 0], atol=1e-12)


def test_frames_that_coincide_are_refused():
    with pytest.raises(ConfigError, match="map_frame and odom_frame are both 'map'"):
        check_frames(NodeConfig(odom_frame='map'))
