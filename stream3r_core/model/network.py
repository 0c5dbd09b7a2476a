"""The causal VGGT network: one architecture and one set of keys for STream3R, StreamVGGT, VGGT."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream3r_core import attention
from stream3r_core.cache.base import KVCache
from stream3r_core.config import ModelConfig
from stream3r_core.errors import InputError
from stream3r_core.model.aggregator import Aggregator
from stream3r_core.model.blocks import Attention, AttentionFn, Mlp
from stream3r_core.model.camera_head import CameraHead
from stream3r_core.model.dpt_head import DPTHead, inverse_log
from stream3r_core.model.track_head import TrackHead
from stream3r_core.model.visibility import FrameAttention, frame_bias, visible_window

OUTPUTS = ('depth', 'points')


class CausalVGGT(nn.Module):
    """Images to camera poses, depth and world points, in a batch or one step of a stream.

    Images are RGB in [0, 1], both sides whole multiples of the patch size. All results are
    float32: ``pose_enc`` [B, S, 9] (see :class:`CameraHead`), ``depth`` [B, S, H, W, 1] along the
    optical axis, ``world_points`` [B, S, H, W, 3] in the camera frame of the first frame of the
    sequence (OpenCV axes), and ``depth_conf``, ``world_points_conf`` [B, S, H, W] >= 1. Lengths
    share one arbitrary scale per sequence. A field of view can be exactly 0.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.autocast_heads = (
            False  # training: let the dense heads follow the surrounding autocast
        )
        self.weights_info = None  # set by load_model
        self.uncertainties = {}  # by uncertainty_name, likewise
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.point_head = DPTHead(config, out_dim=4)
        self.depth_head = DPTHead(config, out_dim=2)
        if config.track is not None:
            self.track_head = TrackHead(config)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.aggregator.camera_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the matrix products of the aggregator, and of its keys and values."""
        return self.aggregator.global_blocks[0].attn.qkv.weight.dtype

    def set_dtype(self, dtype: torch.dtype) -> 'CausalVGGT':
        """Store and multiply the linear layers of encoder and aggregator blocks in ``dtype``.

        The residual stream, norms and all heads stay in float32: poses and depths lose digits
        quickly below it, and the heads are a small part of the work.
        """
        for module in self.aggregator.modules():
            if isinstance(module, (Attention, Mlp)):
                for layer in module.children():
                    if isinstance(layer, nn.Linear):
                        layer.to(dtype)
        return self

    def forward(
        self,
        images: Tensor,
        mode: str = 'full',
        window: int = 5,
        query_points: Tensor | None = None,
        outputs: Collection[str] = OUTPUTS,
        global_attention: Callable[[int], AttentionFn] | None = None,
        dense_frames: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Process all frames of ``images`` [B, S, 3, H, W] or [S, 3, H, W] in one pass.

        ``mode`` says which frames a frame sees: all ('full'), itself and earlier ones ('causal'),
        or the first and the last ``window`` frames including itself ('window').
        ``query_points`` [B, Q, 2], pixels (x, y) of frame 0, adds ``track`` [B, S, Q, 2], ``vis``
        and ``track_conf`` [B, S, Q] in 0..1. ``pose_enc_list`` holds the answer of every iteration
        of the camera head, for training. Left out of ``outputs``: dense maps not wanted.
        ``global_attention(layer)`` takes the place of the rule of ``mode`` in the global blocks.
        ``dense_frames`` (indices): the dense maps are made for these frames only.
        """
        images = self._checked(images)
        queries = self._checked_queries(query_points, len(images))
        S, (height, width) = images.shape[1], images.shape[-2:]
        recent = visible_window(mode, window, S)
        frames = FrameAttention(S, recent)
        bias = frame_bias(S, recent, images.device)
        taps, poses, result = self._predict(
            images,
            global_attention or (lambda layer: frames),
            lambda layer: partial(attention.attend, bias=bias),
            starts_sequence=True,
            outputs=outputs,
            dense_frames=dense_frames,
        )
        result['pose_enc_list'] = poses
        if queries is not None:
            with full_precision(images.device):
                tracks, vis, conf = self.track_head(taps, height, width, queries)
            result.update(track=tracks[-1], vis=vis, track_conf=conf)
        return result

    def stream(
        self,
        images: Tensor,
        aggregator_cache: KVCache,
        camera_cache: KVCache,
        first: bool,
        outputs: Collection[str] = OUTPUTS,
    ) -> dict[str, Tensor]:
        """Process the next frames ``images`` [1, n, 3, H, W] of a stream against its caches.

        ``first``: these frames open the sequence. Frames of one call see each other, later ones
        too: only n = 1 equals the causal batch pass. Layer numbers of ``camera_cache`` are
        iteration * trunk depth + block. The caller commits both caches afterwards. Point tracks
        need the batch pass: the tracker of a single frame leaves each point where it was asked.
        """
        if images.ndim != 5 or len(images) != 1:
            raise InputError(f'a stream takes images [1, n, 3, H, W], got {list(images.shape)}')
        return self._predict(
            self._checked(images),
            partial(CachedAttention, aggregator_cache),
            partial(CachedAttention, camera_cache),
            starts_sequence=first,
            outputs=outputs,
            on_update=aggregator_cache.record_update if aggregator_cache.needs_updates else None,
        )[-1]

    def descriptor(self, images: Tensor) -> Tensor:
        """Return one vector of unit length [B, S, C] per frame, for place recognition."""
        return F.normalize(self.aggregator.encode(self._checked(images)).mean(2), dim=-1)

    def _predict(
        self,
        images: Tensor,
        global_attention: Callable[[int], AttentionFn],
        camera_attention: Callable[[int], AttentionFn],
        starts_sequence: bool,
        outputs: Collection[str],
        on_update: Callable[[int, Tensor], None] | None = None,
        dense_frames: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return the tapped token maps, the poses of every iteration, and the results."""
        if unknown := set(outputs) - set(OUTPUTS):
            raise InputError(f'unknown outputs {sorted(unknown)}; expected some of {OUTPUTS}')
        height, width = images.shape[-2:]
        taps, camera_tokens = self.aggregator(images, global_attention, starts_sequence, on_update)
        with full_precision(images.device):
            poses = self.camera_head(camera_tokens.float(), camera_attention)
            result = {'pose_enc': poses[-1]}
        shown = taps if dense_frames is None else [tap[:, dense_frames] for tap in taps]
        with nullcontext() if self.autocast_heads else full_precision(images.device):
            if 'depth' in outputs:
                depth, result['depth_conf'] = self.depth_head(shown, height, width)
                result['depth'] = depth.exp()
            if 'points' in outputs:
                points, result['world_points_conf'] = self.point_head(shown, height, width)
                result['world_points'] = inverse_log(points)
        return taps, poses, result

    def _checked(self, images: Tensor) -> Tensor:
        """Return float images [B, S, 3, H, W]."""
        patch = self.config.patch_size
        batch = images[None] if images.ndim == 4 else images
        if batch.ndim != 5 or batch.shape[2] != 3 or not batch.is_floating_point():
            raise InputError(
                'expected float images [B, S, 3, H, W] or [S, 3, H, W] in [0, 1], got '
                f'{images.dtype} {list(images.shape)}'
            )
        height, width = batch.shape[-2:]
        if 0 in batch.shape or height % patch or width % patch:
            raise InputError(
                f'image sides must be whole multiples of the patch size {patch}, got '
                f'{height} x {width} (H x W); see stream3r_core.image.prepare'
            )
        return batch.float()

    def _checked_queries(self, query_points: Tensor | None, batch: int) -> Tensor | None:
        if query_points is None:
            return None
        if self.config.track is None:
            raise InputError('this network has no track head; load the preset streamvggt')
        queries = query_points[None] if query_points.ndim == 2 else query_points
        if queries.ndim != 3 or queries.shape[-1] != 2 or len(queries) != batch:
            raise InputError(
                f'expected query_points [{batch}, Q, 2], pixels (x, y), '
                f'got {list(query_points.shape)}'
            )
        return queries.float()


class CachedAttention:
    """Attention of new tokens to what a cache policy keeps of its layer."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache = cache
        self.layer = layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [1, heads, n, head_dim] and return the attended values of q."""
        cache = self.cache
        seen = cache.update(self.layer, k, v)
        column_sums = None
        if cache.needs_column_sums:
            attended, column_sums = attention.attend_with_column_sums(
                q, *seen, query_fraction=cache.query_fraction
            )
        else:
            attended = attention.attend(q, *seen)
        if cache.needs_column_sums or cache.needs_queries:
            cache.record(self.layer, column_sums, q if cache.needs_queries else None)
        return attended


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switch off autocast: the heads compute in float32 whatever surrounds the network."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
