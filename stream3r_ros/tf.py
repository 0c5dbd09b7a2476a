"""Frame names: what may be an end of the transform that the node broadcasts."""

from stream3r_core.errors import ConfigError, InputError
from stream3r_ros.config import NodeConfig


def check_frames(config: NodeConfig) -> None:
    """Raise :class:`ConfigError` unless the configured frames can be frames of tf2."""
    if not config.map_frame:
        raise ConfigError("map_frame must not be empty; REP-105 calls it 'map'")
    for name in ('map_frame', 'camera_frame'):
        frame = getattr(config, name)
        if frame.startswith('/'):
            raise ConfigError(f'{name}: tf2 takes no leading slash, got {frame!r}')
    if config.camera_frame == config.map_frame:
        raise ConfigError(f'camera_frame and map_frame are both {config.map_frame!r}')


def camera_frame(image_frame_id: str, config: NodeConfig) -> str:
    """Return the optical frame of an image: the configured one, or the image's own frame_id.

    Raises :class:`InputError` where that is no frame that can hang below ``map_frame``.
    """
    frame = config.camera_frame or image_frame_id
    if not frame:
        raise InputError('the image has no frame_id; set the parameter camera_frame')
    if frame.startswith('/'):
        raise InputError(
            f'the image has frame_id {frame!r}: tf2 takes no leading slash; set camera_frame'
        )
    if frame == config.map_frame:
        raise InputError(
            f'the image has frame_id {frame!r}, which is also map_frame; set one of the '
            'parameters map_frame and camera_frame'
        )
    return frame
