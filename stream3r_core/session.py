"""Streaming: one frame in, one prediction out, memory as large as the cache says."""

import torch
from torch import Tensor

from stream3r_core.cache.base import KVCache
from stream3r_core.cache.dense import DenseCache
from stream3r_core.cache.shared import SharedIterationsCache
from stream3r_core.cache.window import WindowCache
from stream3r_core.config import ImageConfig, ModelConfig, SessionConfig, from_dict
from stream3r_core.errors import ConfigError, InputError
from stream3r_core.geometry import decode_pose, invert_se3
from stream3r_core.image import ImageGeometry, prepare
from stream3r_core.types import FramePrediction

ALL_OUTPUTS = ('depth', 'points')


class StreamSession:
    """Feed a network one camera image after the other.

    ``mode='causal'`` attends to all past frames (equal to ``model(images, mode='causal')``);
    ``mode='window'`` to the anchor frame and recent ones. With ``window_rule='published'`` a frame
    sees the anchor, the last ``window`` past frames and itself, as the published session does and
    as the batch pass with window + 1; with ``'exact'`` it equals the batch pass with ``window``
    (model.md 9.2). ``camera_cache='shared'`` gives the published StreamVGGT streaming poses
    (model.md 9.3). ``outputs`` names the dense heads to run: ``'depth'``, ``'points'``.

    The session keeps no history: what a caller does not store is gone.
    """

    def __init__(
        self,
        model,
        mode: str = 'causal',
        window: int = 5,
        window_rule: str = 'published',
        camera_cache: str = 'per_iteration',
        max_frames: int = 0,
        image: ImageConfig | None = None,
        outputs: tuple[str, ...] = ALL_OUTPUTS,
    ):
        self.config = from_dict(
            SessionConfig,
            {
                'mode': mode,
                'window': window,
                'window_rule': window_rule,
                'camera_cache': camera_cache,
                'max_frames': max_frames,
            },
            'session',
        )
        if mode == 'full':
            raise ConfigError(
                "mode 'full' lets every frame see every other and cannot stream; "
                "use 'causal' or 'window', or model(images, mode='full') for a set of photos"
            )
        self.model = model
        self.image_config = image or ImageConfig()
        self.outputs = outputs
        self.cache, self.camera_cache = make_caches(model.config, self.config)
        self.num_frames = 0
        self._size_hw: tuple[int, int] | None = None

    def reset(self) -> None:
        """Start a new stream: the next frame becomes the anchor. Allocated memory is kept."""
        self.cache.reset()
        self.camera_cache.reset()
        self.num_frames = 0
        self._size_hw = None

    def step(self, image, stamp_ns: int | None = None, K: Tensor | None = None) -> FramePrediction:
        """Process one camera image of any size.

        ``image``: uint8, or float in [0, 1]; [H, W, 3] RGB (array or tensor; see
        :func:`stream3r_core.image.prepare` for what else is taken). ``K`` [3, 3], pixels of
        ``image``: known intrinsics, used instead of the predicted field of view.
        Raises :class:`InputError` for an unusable image; the stream goes on with the next one.
        """
        frame, geometry = prepare(image, self.image_config, self.model.config)
        raw = self.step_tensor(frame)
        return to_prediction(raw, frame, geometry, self.num_frames - 1, stamp_ns, K)

    @torch.inference_mode()
    def step_tensor(self, image: Tensor) -> dict[str, Tensor]:
        """Process one float image [3, H, W] in [0, 1] at network size; return its raw outputs.

        Names and units as in the batch pass, without batch and frame axes: ``pose_enc`` [9],
        ``depth`` [H, W, 1], ``depth_conf`` [H, W], ``world_points`` [H, W, 3],
        ``world_points_conf`` [H, W].
        """
        self._check_frame(image)
        images = image.to(self.model.device, non_blocking=True)[None, None]
        try:
            raw = self.model.stream(
                images, self.cache, self.camera_cache, self.num_frames == 0, self.outputs
            )
        except BaseException:  # out of memory, interrupt: the stream stays usable
            self.cache.rollback()
            self.camera_cache.rollback()
            raise
        self.cache.commit(1)
        self.camera_cache.commit(1)
        self._size_hw = tuple(image.shape[-2:])
        self.num_frames += 1
        return {name: value[0, 0] for name, value in raw.items()}

    def _check_frame(self, image: Tensor) -> None:
        patch = self.model.config.patch_size
        if (
            image.ndim != 3
            or image.shape[0] != 3
            or any(s % patch or not s for s in image.shape[1:])
        ):
            raise InputError(
                f'expected a float image [3, H, W] with H and W multiples of {patch}, '
                f'got {list(image.shape)}; StreamSession.step resizes camera images'
            )
        if self._size_hw is not None and tuple(image.shape[-2:]) != self._size_hw:
            raise InputError(
                f'this stream has {self._size_hw[1]}x{self._size_hw[0]} network images, got '
                f'{image.shape[2]}x{image.shape[1]}; reset the session to go on with another size'
            )


@torch.inference_mode()
def to_prediction(
    raw: dict[str, Tensor],
    frame: Tensor,
    geometry: ImageGeometry,
    index: int,
    stamp_ns: int | None = None,
    K_camera: Tensor | None = None,
) -> FramePrediction:
    """Turn the raw outputs of one frame [3, H, W] into a prediction (model.md 14)."""
    height, width = frame.shape[-2:]
    T_camera_world, K = decode_pose(raw['pose_enc'].float(), height, width)
    if K_camera is not None:
        K = geometry.network_K(torch.as_tensor(K_camera)).to(K)
    return FramePrediction(
        index=index,
        stamp_ns=stamp_ns,
        T_world_camera=invert_se3(T_camera_world),
        K=K,
        rgb=(frame.permute(1, 2, 0) * 255).round().to(torch.uint8),
        depth=raw['depth'][..., 0],
        depth_conf=raw['depth_conf'],
        world_points=raw.get('world_points'),
        world_points_conf=raw.get('world_points_conf'),
        geometry=geometry,
    )


def make_caches(model: ModelConfig, session: SessionConfig) -> tuple[KVCache, KVCache]:
    """Return the aggregator's and the camera head's cache for the configured policy."""
    iterations, trunk = model.camera_iterations, model.camera_trunk_depth
    aggregator = _policy(session, model.depth)
    if session.camera_cache == 'per_iteration':
        return aggregator, _policy(session, iterations * trunk)
    return aggregator, SharedIterationsCache(_policy(session, trunk, iterations), trunk)


def _policy(session: SessionConfig, num_layers: int, updates_per_frame: int = 1) -> KVCache:
    if session.mode == 'causal':
        return DenseCache(num_layers, session.max_frames, updates_per_frame)
    past_frames = session.window - (session.window_rule == 'exact')
    return WindowCache(num_layers, past_frames, updates_per_frame)
