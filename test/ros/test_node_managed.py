"""The node obeys a lifecycle manager and takes live parameters."""

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter

pytestmark = pytest.mark.ros


@pytest.fixture
def change_state(live):
    """Return a function that asks for a transition and returns whether it succeeded."""
    return lambda number: (
        live.request(ChangeState, 'change_state', transition=Transition(id=number)).success
    )


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
    live.wait_for_path(0, 1, 3)  # the session went on
    assert change_state(Transition.TRANSITION_DEACTIVATE)
    assert change_state(Transition.TRANSITION_CLEANUP)
    wait_for_state(live, 'unconfigured')
    live.wait_until(lambda: live.figure('cache_capacity_bytes') == live.figure('map_points') == 0)
    assert change_state(Transition.TRANSITION_CONFIGURE)
    assert change_state(Transition.TRANSITION_ACTIVATE)
    live.feed(4)
    live.wait_for_path(4)  # a new session


def test_shutdown_shuts_images_out(live, change_state):
    live.start()
    live.connect_camera()
    live.feed(0)
    assert change_state(Transition.TRANSITION_ACTIVE_SHUTDOWN)
    wait_for_state(live, 'finalized')
    live.camera.publish(live.image(1))
    live.wait_until(lambda: live.figure('images_dropped.inactive') == 1)
    assert live.figure('images_processed') == 1


def test_configuring_with_missing_weights_fails_and_the_node_stays(live, change_state):
    weights = 'missing.safetensors'
    live.start(wait_until_active=False, **{'autostart': 'false', 'model.weights': weights})
    wait_for_state(live, 'unconfigured')
    assert not change_state(Transition.TRANSITION_CONFIGURE)
    assert f'{weights}: no such file' in live.log
    assert not change_state(Transition.TRANSITION_CONFIGURE)  # and may be asked again


def test_live_parameters_act_on_the_next_image(live):
    live.start()
    live.connect_camera()
    live.feed(0)
    full = live.wait_for('~/cloud', 1)[0].width
    assert full > 0
    live.set_parameter('mapping.min_confidence', 1e6)
    live.feed(1)
    assert live.wait_for('~/cloud', 2)[1].width == 0
    live.set_parameter('outputs.cloud.enabled', False)
    live.feed(2)
    live.wait_for('~/depth/image', 3)
    assert len(live.received['~/cloud']) == 2
    given = [Parameter('session.window', value=3).to_parameter_msg()]
    (refused,) = live.request(SetParameters, 'set_parameters', parameters=given).results
    assert not refused.successful and refused.reason
