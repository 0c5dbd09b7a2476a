"""The camera cache of the published StreamVGGT streaming: one list for all refinement passes."""

from torch import Tensor

from stream3r_core.cache.base import Attended, KVCache


class SharedIterationsCache(KVCache):
    """Let the refinement passes of the camera head share one cache per trunk layer.

    The network numbers camera layers ``iteration * trunk_depth + layer``; here they fold onto
    ``layer``, so that pass t of frame i sees all passes of past frames and the earlier passes of
    its own (model.md 9.3). ``inner`` must take ``iterations`` updates per frame.
    """

    def __init__(self, inner: KVCache, trunk_depth: int):
        self.inner = inner
        self.trunk_depth = trunk_depth

    def begin(self, num_frames: int) -> None:
        """Announce a step."""
        self.inner.begin(num_frames)

    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Append to the list that all passes of this trunk layer share."""
        return self.inner.update(layer % self.trunk_depth, k, v)

    def commit(self, num_frames: int, *args, **kwargs) -> None:
        """End the step."""
        self.inner.commit(num_frames, *args, **kwargs)

    def rollback(self) -> None:
        """Drop the open frame."""
        self.inner.rollback()

    def reset(self) -> None:
        """Forget all frames."""
        self.inner.reset()

    @property
    def num_tokens(self) -> int:
        """Tokens per layer and head that the next frame will find."""
        return self.inner.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the live keys and values."""
        return self.inner.num_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated."""
        return self.inner.capacity_bytes
