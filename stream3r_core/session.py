"""Streaming: one frame in, one prediction out, memory as large as the cache says."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stream3r_core.attention import explain_stream
from stream3r_core.cache.policies import KV_BITS, make_caches, resolve_cache_config
from stream3r_core.config import CacheConfig, ImageConfig, SessionConfig, from_dict
from stream3r_core.errors import CacheError, ConfigError, InputError
from stream3r_core.geometry import decode_pose, invert_se3, transform_points
from stream3r_core.image import ImageGeometry, prepare
from stream3r_core.stillness import StillnessGate
from stream3r_core.types import FramePrediction

ALL_OUTPUTS = ('depth', 'points')
_POINTS_CONF = 'world_points_conf'


class _Waiting(NamedTuple):
    """A prepared image that waits for its chunk to fill."""

    frame: Tensor  # [3, H, W]
    geometry: ImageGeometry
    stamp_ns: int | None
    K: Tensor | None  # pixels of the camera image


class StreamSession:
    """Feed a network one camera image after the other.

    ``mode='causal'`` attends to all past frames (equal to ``model(images, mode='causal')``);
    ``mode='window'`` to the anchor frame and recent ones. With ``window_rule='published'`` a frame
    sees the anchor, the last ``window`` past frames and itself, as the published session does and
    as the batch pass with window + 1; with ``'exact'`` it equals the batch pass with ``window``
    (model.md 9.2). ``camera_cache='shared'`` gives the published StreamVGGT streaming poses
    (model.md 9.3). ``outputs`` names the dense heads to run, see :attr:`outputs`.

    ``mode='stac'`` and ``'stac_paper'`` hold a bounded spatial memory; ``cache`` has its sizes.
    With ``cache.chunk_size`` n > 1, n frames are processed together and see each other.

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
        device_frames: int = 0,
        kv_dtype: str = 'model',
        image: ImageConfig | None = None,
        outputs: tuple[str, ...] = ALL_OUTPUTS,
        cache: CacheConfig | None = None,
    ):
        self.config = from_dict(
            SessionConfig,
            {
                'mode': mode,
                'window': window,
                'window_rule': window_rule,
                'camera_cache': camera_cache,
                'max_frames': max_frames,
                'device_frames': device_frames,
                'kv_dtype': kv_dtype,
            },
            'session',
        )
        if mode == 'full':
            raise ConfigError(
                "mode 'full' lets every frame see every other and cannot stream; "
                "use another mode, or model(images, mode='full') for a set of photos"
            )
        self.model = model
        self.image_config = image or ImageConfig()
        self.cache_config = resolve_cache_config(mode, cache)
        self.cache, self.camera_cache = make_caches(model, self.config, self.cache_config)
        self.outputs = outputs
        self.num_frames = 0
        self.is_broken = False  # the memory lacks a part of a step; only a reset helps
        self._waiting: list[_Waiting] = []
        self._size_hw: tuple[int, int] | None = None
        self._gate: StillnessGate | None = None
        if self.cache_config is not None and self.cache_config.skip_still:
            self._gate = StillnessGate(self.cache_config, model.config.patch_size)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The dense heads that run, ``'depth'`` and ``'points'``; may change between frames.

        Without the depth head depth and its confidence are those of the points. A memory that
        reads the points has their head run in any case.
        """
        return self._outputs

    @outputs.setter
    def outputs(self, outputs: tuple[str, ...]) -> None:
        if not outputs or not set(outputs) <= set(ALL_OUTPUTS):
            raise ConfigError(f'outputs: expected one or both of {ALL_OUTPUTS}, got {outputs!r}')
        needed = {*outputs, 'points'} if self.cache.needs_points else {*outputs}
        self._outputs = tuple(name for name in ALL_OUTPUTS if name in needed)

    @property
    def chunk_size(self) -> int:
        """Frames that are processed together; 1 in all modes without chunks."""
        return 1 if self.cache_config is None else self.cache_config.chunk_size

    @property
    def num_waiting(self) -> int:
        """Images that wait for their chunk to fill."""
        return len(self._waiting)

    def explain_attention(self) -> dict[str, str]:
        """Say of each attention backend whether it serves the frames to come, or why not."""
        model = self.model
        return explain_stream(
            model.device, model.dtype, model.config.head_dim,
            self.cache.needs_column_sums, KV_BITS[self.config.kv_dtype],
        )  # fmt: skip

    @torch.inference_mode()
    def reset(self) -> None:
        """Start a new stream: the next frame becomes the anchor. Allocated memory is kept."""
        self.cache.reset()
        self.camera_cache.reset()
        self.is_broken = False
        self.num_frames = 0
        self._waiting = []
        self._size_hw = None
        if self._gate is not None:
            self._gate.reset()

    def step(
        self, image, stamp_ns: int | None = None, K: Tensor | None = None
    ) -> FramePrediction | list[FramePrediction] | None:
        """Process one camera image of any size.

        ``image``: uint8, or float in [0, 1]; [H, W, 3] RGB (array or tensor; see
        :func:`stream3r_core.image.prepare` for what else is taken). ``K`` [3, 3], pixels of
        ``image``: known intrinsics, used instead of the predicted field of view.
        With a chunk size n > 1 the image waits until its chunk is full: the answer is None, or the
        list of all n predictions. :meth:`flush` ends a chunk early.
        Raises :class:`InputError` for an unusable image; the stream goes on with the next one. Any
        other error drops the images of the step. If it came while their memory was being stored,
        :attr:`is_broken` is true, and every step raises :class:`CacheError` until :meth:`reset`.
        """
        self._waiting.append(self._prepared(image, stamp_ns, K))
        if len(self._waiting) < self.chunk_size:
            return None
        predictions = self.flush()
        return predictions[0] if self.chunk_size == 1 else predictions

    def step_chunk(
        self,
        images: Sequence,
        stamps_ns: Sequence[int] | None = None,
        Ks: Sequence[Tensor] | None = None,
    ) -> list[FramePrediction]:
        """Process up to ``chunk_size`` camera images together, at once; see :meth:`step`."""
        if self._waiting or not 1 <= len(images) <= self.chunk_size:
            raise InputError(
                f'a chunk takes 1 to {self.chunk_size} images, got {len(images)}, with '
                f'{len(self._waiting)} waiting from step (flush them first)'
            )
        nothing = [None] * len(images)
        stamps_ns, Ks = (nothing if x is None else x for x in (stamps_ns, Ks))
        if not len(stamps_ns) == len(Ks) == len(images):
            raise InputError(
                f'a chunk of {len(images)} images takes as many stamps and intrinsics, got '
                f'{len(stamps_ns)} and {len(Ks)}'
            )
        try:
            for image, stamp_ns, K in zip(images, stamps_ns, Ks):
                self._waiting.append(self._prepared(image, stamp_ns, K))
        except BaseException:
            self._waiting = []  # a chunk is taken whole or not at all
            raise
        return self.flush()

    def _prepared(self, image, stamp_ns: int | None, K: Tensor | None) -> _Waiting:
        K = None if K is None else _intrinsics(K)
        frame, geometry = prepare(image, self.image_config, self.model.config)
        self._check_frame(frame)
        return _Waiting(frame, geometry, stamp_ns, K)

    def flush(self) -> list[FramePrediction]:
        """Process the images that wait for their chunk to fill; none: an empty list."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        raw, still = self._process(torch.stack([w.frame for w in waiting]))
        first = self.num_frames - len(waiting)
        return [
            to_prediction(
                {name: value[i] for name, value in raw.items()},
                w.frame, w.geometry, first + i, w.stamp_ns, w.K, still[i],
            )
            for i, w in enumerate(waiting)
        ]  # fmt: skip

    def step_tensor(self, image: Tensor) -> dict[str, Tensor]:
        """Process one float image [3, H, W] in [0, 1] at network size; return its raw outputs.

        Names and units as in the batch pass, without batch and frame axes: ``pose_enc`` [9],
        ``depth`` [H, W, 1], ``depth_conf`` [H, W], ``world_points`` [H, W, 3],
        ``world_points_conf`` [H, W]. Never waits for a chunk to fill; raises :class:`InputError`
        while images of :meth:`step` do, for it must not overtake them.
        """
        if self._waiting:
            raise InputError(
                f'a frame of step_tensor would overtake {len(self._waiting)} waiting from step; '
                'flush them first'
            )
        self._check_frame(image)
        raw, _ = self._process(image[None])
        return {name: value[0] for name, value in raw.items()}

    @torch.inference_mode()
    def _process(self, frames: Tensor) -> tuple[dict[str, Tensor], list[bool]]:
        """Run frames [n, 3, H, W] through network and caches; say which were still."""
        if self.model.device.type == 'cuda' and frames.device.type == 'cpu':
            frames = frames.pin_memory()  # or the copy would wait (unproven: no GPU)
        images = frames.to(self.model.device, non_blocking=True)[None]
        try:
            self.cache.begin(len(frames))
            self.camera_cache.begin(len(frames))
            raw = self.model.stream(
                images, self.cache, self.camera_cache, self.num_frames == 0, self.outputs
            )
            raw = {name: value[0] for name, value in raw.items()}
            still = self._find_still(frames, raw)
        except BaseException:  # out of memory, interrupt: the stream stays usable
            self.cache.rollback()
            self.camera_cache.rollback()
            if self._gate is not None:
                self._gate.rollback()
            raise
        self.is_broken = True  # unless all of the step gets stored
        self._commit(raw, still)
        self.is_broken = False
        self._size_hw = tuple(frames.shape[-2:])
        self.num_frames += len(frames)
        return raw, still

    def _find_still(self, frames: Tensor, raw: dict[str, Tensor]) -> list[bool]:
        if self._gate is None:
            return [False] * len(frames)
        still = []
        for i, frame in enumerate(frames):
            view = self._gate.look(frame)
            T_camera_world, _ = decode_pose(raw['pose_enc'][i], *frames.shape[-2:])
            T_world_camera = invert_se3(T_camera_world)
            depth, _ = _depth_of({name: value[i] for name, value in raw.items()}, T_camera_world)
            still.append(self._gate.is_still(view, T_world_camera, depth))
            if not still[i]:
                self._gate.keep(view, T_world_camera)
        return still

    def _commit(self, raw: dict[str, Tensor], still: list[bool]) -> None:
        points, conf = raw.get('world_points'), raw.get(_POINTS_CONF)
        if self._gate is not None:
            self._gate.commit()
        if self.cache_config is None:
            self.cache.commit(len(still))
            self.camera_cache.commit(len(still))
            return
        keep = [not s for s in still]
        self.cache.commit(len(still), points, conf, keep=keep)
        self.camera_cache.commit(len(still), keep=keep)

    def _check_frame(self, image: Tensor) -> None:
        if self.is_broken:
            raise CacheError(
                'the memory of this stream is incomplete, for a step ended while it was being '
                'stored; call reset'
            )
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
        size_hw = self._waiting[0].frame.shape[-2:] if self._waiting else self._size_hw
        if size_hw is not None and tuple(image.shape[-2:]) != tuple(size_hw):
            raise InputError(
                f'this stream has {size_hw[1]}x{size_hw[0]} network images, got '
                f'{image.shape[2]}x{image.shape[1]}; reset the session to go on with another size'
            )


def _intrinsics(K) -> Tensor:
    """Return intrinsics [3, 3], given as anything like an array, as a tensor."""
    try:
        K = torch.as_tensor(K)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f'expected intrinsics K [3, 3], got {K!r}: {error}') from error
    K = K if K.is_floating_point() else K.float()
    if tuple(K.shape) != (3, 3):
        raise InputError(f'expected intrinsics K [3, 3], got {list(K.shape)}')
    if not (K.isfinite().all() and (K.diagonal() > 0).all()):
        raise InputError(
            f'expected intrinsics K, finite and with positive focal lengths, got {K.tolist()}'
        )
    return K


def _depth_of(raw: dict[str, Tensor], T_camera_world: Tensor) -> tuple[Tensor, Tensor]:
    """Return depth and confidence [H, W] of one frame; without a depth head, of its points."""
    if 'depth' in raw:
        return raw['depth'][..., 0], raw['depth_conf']
    return transform_points(T_camera_world, raw['world_points'])[..., 2], raw[_POINTS_CONF]


@torch.inference_mode()
def to_prediction(
    raw: dict[str, Tensor],
    frame: Tensor,
    geometry: ImageGeometry,
    index: int,
    stamp_ns: int | None = None,
    K_camera: Tensor | None = None,
    still: bool = False,
) -> FramePrediction:
    """Turn the raw outputs of one frame [3, H, W] into a prediction (model.md 14)."""
    height, width = frame.shape[-2:]
    T_camera_world, K = decode_pose(raw['pose_enc'].float(), height, width)
    if K_camera is not None:
        K = geometry.network_K(K_camera).to(K)
    depth, confidence = _depth_of(raw, T_camera_world)
    return FramePrediction(
        index=index,
        stamp_ns=stamp_ns,
        T_world_camera=invert_se3(T_camera_world),
        K=K,
        rgb=(frame.permute(1, 2, 0) * 255).round().to(torch.uint8),
        depth=depth,
        depth_conf=confidence,
        world_points=raw.get('world_points'),
        world_points_conf=raw.get(_POINTS_CONF),
        geometry=geometry,
        still=still,
    )
