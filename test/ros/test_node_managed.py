"""The node obeys a lifecycle manager and takes live parameters."""

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from node_harness import stamp
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter

from stream3r_ros.conversions import stamp_ns

pytestmark = pytest.mark.ros


def request(live, node, kind, service, message):
    client = node.create_client(kind, f'/stream3r/{service}')
    live.wait_until(client.service_is_ready)
    future = client.call_async(message)
    live.wait_until(future.done)
    return future.result()


@pytest.fixture
def change_state(live, node):
    """Return a function that asks for a transition and returns whether it succeeded."""

    def change(transition):
        message = ChangeState.Request(transition=Transition(id=transition))
        return request(live, node, ChangeState, 'change_state', message).success

    return change


@pytest.fixture
def set_parameter(live, node):
    """Return a function that sets a parameter and returns the answer."""

    def set_one(name, value):
        message = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]
        )
        return request(live, node, SetParameters, 'set_parameters', message).results[0]

    return set_one


def wait_for_state(live, state):
    live.wait_until(lambda: live.figure('state') == state)


def test_a_lifecycle_manager_leads_the_node_through_its_states(live, change_state):
    live.start(wait_until_active=False, **{'autostart': 'false', 'outputs.path.max_rate_hz': 0})
    wait_for_state(live, 'unconfigured')
    assert not live.call('reset').success  # nothing to reset yet, and it says so
    assert change_state(Transition.TRANSITION_CONFIGURE)
    wait_for_state(live, 'inactive')
    live.connect_camera()
    live.wait_until(lambda: live.figure('images_dropped.inactive'))
    assert change_state(Transition.TRANSITION_ACTIVATE)
    live.feed(0, 1)
    assert change_state(Transition.TRANSITION_DEACTIVATE)
    wait_for_state(live, 'inactive')
    before = live.figure('images_dropped.inactive')
    live.camera.publish(live.image(2))
    live.wait_until(lambda: live.figure('images_dropped.inactive') == before + 1)
    assert change_state(Transition.TRANSITION_ACTIVATE)
    live.feed(3)
    path = live.wait_for('~/path', 3)[-1]  # the session went on
    assert [stamp_ns(pose) for pose in path.poses] == [stamp(0), stamp(1), stamp(3)]
    assert change_state(Transition.TRANSITION_DEACTIVATE)
    assert change_state(Transition.TRANSITION_CLEANUP)
    wait_for_state(live, 'unconfigured')
    live.wait_until(lambda: live.figure('cache_capacity_bytes') == live.figure('map_points') == 0)
    assert change_state(Transition.TRANSITION_CONFIGURE)
    assert change_state(Transition.TRANSITION_ACTIVATE)
    live.feed(4)
    assert len(live.wait_for('~/path', 4)[-1].poses) == 1  # a new session


def test_configuring_with_missing_weights_fails_and_the_node_stays(live, change_state):
    weights = 'missing.safetensors'
    live.start(wait_until_active=False, **{'autostart': 'false', 'model.weights': weights})
    wait_for_state(live, 'unconfigured')
    assert not change_state(Transition.TRANSITION_CONFIGURE)
    assert f'{weights}: no such file' in live.log
    assert not change_state(Transition.TRANSITION_CONFIGURE)  # and may be asked again


def test_live_parameters_act_on_the_next_image(live, set_parameter):
    live.start()
    live.connect_camera()
    live.feed(0)
    full = live.wait_for('~/cloud', 1)[0].width
    assert full > 0
    assert set_parameter('mapping.min_confidence', 1e6).successful
    live.feed(1)
    assert live.wait_for('~/cloud', 2)[1].width == 0
    assert set_parameter('outputs.cloud.enabled', False).successful
    live.feed(2)
    live.wait_for('~/depth/image', 3)
    assert len(live.received['~/cloud']) == 2
    refused = set_parameter('session.window', 3)
    assert not refused.successful and refused.reason
