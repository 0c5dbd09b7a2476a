"""Python logging of the core, forwarded to the logger of a ROS node."""

import logging

_FORWARDED = ('stream3r_core', 'stream3r_ros')


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
