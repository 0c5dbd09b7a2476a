"""Python logging of the core, forwarded to the logger of a ROS node."""

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable

_FORWARDED = ('stream3r_core', 'stream3r_ros')
QUIET_S = 5.0
MAX_KINDS = 64
_VARYING = re.compile(r"""'[^']*'|"[^"]*"|[-+.\w]*\d[-+.\w]*|\b(nan|inf)\b""")


class Throttled:
    """Says each kind of thing at most every ``quiet_s``, in bounded memory.

    Texts that differ in numbers and in quoted words only are of one kind.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        quiet_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._say, self._quiet_s, self._clock = say, quiet_s, clock
        self._said: OrderedDict[str, float] = OrderedDict()

    def __call__(self, text: str) -> None:
        """Say it, or nothing."""
        now, kind = self._clock(), _VARYING.sub('#', text)
        if now < self._said.get(kind, float('-inf')) + self._quiet_s:
            return
        self._said[kind] = now
        self._said.move_to_end(kind)
        if len(self._said) > MAX_KINDS:
            self._said.popitem(last=False)
        self._say(text)


class RosLogHandler(logging.Handler):
    """Hands log records to an rclpy logger; drops them once the ROS context is down."""

    def __init__(self, logger, context):
        super().__init__()
        self._logger = logger
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record at the level of the same name."""
        if not self._context.ok():
            return
        text = self.format(record)
        # rclpy ties one severity to one calling line: hence a line per level
        if record.levelno >= logging.CRITICAL:
            self._logger.fatal(text)
        elif record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


def forward_logging(node) -> RosLogHandler:
    """Send what this package logs to the node's logger; undo with :func:`stop_forwarding`."""
    handler = RosLogHandler(node.get_logger(), node.context)
    for name in _FORWARDED:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return handler


def stop_forwarding(handler: RosLogHandler) -> None:
    """Undo :func:`forward_logging`."""
    for name in _FORWARDED:
        logger = logging.getLogger(name)
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
