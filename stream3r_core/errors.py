"""The exceptions of the package: one base class, few children, each message says what to do."""


class Stream3rError(Exception):
    """Base of every error that a user of this package can cause and mend."""


class ConfigError(Stream3rError):
    """A configuration value, key or preset name is not usable."""


class InputError(Stream3rError):
    """An image, message or array is not what the called function takes."""


class NotLocalizedError(InputError):
    """A session has taken an image, but where that is in the map is not known yet."""


class CheckpointError(Stream3rError):
    """Weights are missing, truncated, or do not fit the network."""


class CacheError(Stream3rError):
    """A cache cannot hold what it is asked to hold; the session is usable again after reset."""


class DataError(Stream3rError):
    """A bag, folder or file cannot be read as the data it should hold."""


class OutputError(Stream3rError):
    """A result cannot be written where it was asked for."""


class MissingDependencyError(Stream3rError):
    """An optional package or system library is needed and absent."""


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, without the lines that explain it."""
    return str(error).strip().partition('\n')[0]
