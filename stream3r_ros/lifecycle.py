"""Transitions of a managed node that fail in words."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from stream3r_core.errors import Stream3rError
from stream3r_ros.services import describe

Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]


def told(transition: Transition) -> Transition:
    """Log the error that ends a transition; rclpy keeps it to itself.

    A known one leaves the node in the state that it was in, any other leads to ``on_error``.
    """

    @wraps(transition)
    def run(node: Any, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            node.get_logger().fatal(describe(error))
            is_known = isinstance(error, Stream3rError)
            return TransitionCallbackReturn.FAILURE if is_known else TransitionCallbackReturn.ERROR

    return run
