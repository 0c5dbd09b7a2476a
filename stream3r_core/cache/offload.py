"""Dense cache whose later frames wait in host memory (mode causal on a small GPU)."""

import torch
from torch import Tensor

from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.cache.dense import GROWTH, full_cache_message
from stream3r_core.errors import CacheError


class OffloadedCache(KVCache):
    """Keep all frames: the first ``device_frames`` on the device, the others in host memory.

    A layer that is attended to is put together in one buffer on the device, which all layers
    share; what waits in host memory is copied there for every layer of every frame. Slow, and
    the last way out before a bounded mode: each frame costs its keys and values in host memory.
    """

    def __init__(self, num_layers: int, device_frames: int, max_frames: int = 0):
        self.num_layers = num_layers
        self.device_frames = device_frames
        self.max_frames = max_frames
        self.num_frames = 0
        self._frame_tokens = 0
        self._near: list[Tensor] = []  # per layer [2, 1, heads, device_frames * T, head_dim]
        self._far: list[Tensor] = []  # the same on the host, grown in steps
        self._whole = torch.empty(0)  # what the layer at hand attends to

    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Append the tokens of the open step and return all of the layer."""
        if self.max_frames and self.num_frames >= self.max_frames:
            raise CacheError(full_cache_message(self.max_frames))
        if self.num_frames == 0 and layer == 0:
            self._fit_storage(k)
        past, new = self.num_frames * self._frame_tokens, k.shape[2]
        near, far = self._near[layer], self._far_storage(layer, past + new)
        bound = near.shape[3]
        whole = self._whole_storage(near, past + new)
        whole[:, :, :, past : past + new] = torch.stack((k, v))
        on_device = min(past, bound)
        whole[:, :, :, :on_device] = near[:, :, :, :on_device]
        whole[:, :, :, on_device:past].copy_(far[:, :, :, : past - on_device], non_blocking=True)
        fitting = max(0, min(bound - past, new))
        near[:, :, :, past : past + fitting] = whole[:, :, :, past : past + fitting]
        start = past + fitting - bound
        far[:, :, :, start : start + new - fitting].copy_(
            whole[:, :, :, past + fitting : past + new], non_blocking=True
        )
        return Attended(*whole[:, :, :, : past + new])

    def _fit_storage(self, k: Tensor) -> None:
        """Allocate storage for tensors like ``k``, or keep what fits."""
        self._frame_tokens = k.shape[2]
        shape = (2, 1, k.shape[1], self.device_frames * k.shape[2], k.shape[3])
        old = self._near[0] if self._near else k.new_empty(0)
        if (old.shape, old.dtype, old.device) == (shape, k.dtype, k.device):
            return
        self._near, self._far, self._whole = [], [], k.new_empty(0)  # free the old storage first
        self._near = [k.new_empty(shape) for _ in range(self.num_layers)]
        self._far = [self._host(k, shape, 0) for _ in range(self.num_layers)]

    def _host(self, like: Tensor, shape: tuple[int, ...], tokens: int) -> Tensor:
        pinned = like.device.type == 'cuda'
        return torch.empty((*shape[:3], tokens, shape[4]), dtype=like.dtype, pin_memory=pinned)

    def _far_storage(self, layer: int, tokens: int) -> Tensor:
        near, far = self._near[layer], self._far[layer]
        missing = tokens - near.shape[3] - far.shape[3]
        if missing > 0:
            grown = self._host(near, near.shape, int(GROWTH * far.shape[3]) + missing)
            if near.device.type == 'cuda':  # which may still be writing what is copied now
                torch.cuda.synchronize(near.device)
            grown[:, :, :, : far.shape[3]] = far
            self._far[layer] = grown
        return self._far[layer]

    def _whole_storage(self, like: Tensor, tokens: int) -> Tensor:
        if self._whole.ndim == 1 or self._whole.shape[3] < tokens:
            self._whole = like.new_empty(*like.shape[:3], int(GROWTH * tokens), like.shape[4])
        return self._whole

    def commit(
        self, num_frames: int, points: Tensor | None = None, conf: Tensor | None = None
    ) -> None:
        """End the step."""
        self.num_frames += num_frames

    def rollback(self) -> None:
        """Forget the open step: nothing to do, the next one overwrites it."""

    def reset(self) -> None:
        """Forget all frames; storage is kept for the next stream."""
        self.num_frames = 0

    @property
    def num_tokens(self) -> int:
        """Tokens per layer and head that the next frame will find."""
        return self.num_frames * self._frame_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of all live keys and values, on the device and the host."""
        return sum(self.num_tokens * x[..., :1, :].numel() * x.element_size() for x in self._near)

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated on the device."""
        return sum(x.nbytes for x in (*self._near, self._whole))

    @property
    def host_bytes(self) -> int:
        """Bytes allocated in host memory."""
        return sum(x.nbytes for x in self._far)
