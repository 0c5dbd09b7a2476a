"""``std_srvs/Trigger`` services that answer in words and never hold the executor."""

import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import rclpy.task
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from std_srvs.srv import Trigger

from stream3r_core.errors import Stream3rError


class Services:
    """Offers actions of a node as services; one is answered after the other, images go on."""

    def __init__(self, node: Any):
        self._node, self._group = node, MutuallyExclusiveCallbackGroup()

    def add(self, name: str, action: Callable[[], Awaitable[str]]) -> None:
        """Offer an action; it returns the reply, or raises the reason why it failed."""

        async def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            try:
                response.message = await action()
                response.success = True
            except Exception as error:  # the caller gets the reason; the node lives on
                response.message = str(error)
                if not isinstance(error, Stream3rError):
                    self._node.get_logger().error(describe(error))
            return response

        self._node.create_service(Trigger, name, answer, callback_group=self._group)

    async def finished(self, future: Future) -> Any:
        """Return the outcome of a worker's call, for an action that waits for it."""
        executor, done = self._node.executor, rclpy.task.Future()
        future.add_done_callback(lambda _: executor.create_task(done.set_result, None))
        await done
        return future.result()


def describe(error: BaseException) -> str:
    """Return one line for an error that the user can mend, the traceback for any other."""
    if isinstance(error, Stream3rError):
        return str(error)
    return ''.join(traceback.format_exception(error)).rstrip()
