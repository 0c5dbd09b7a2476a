"""The small interface between the network and a cache policy.

The network hands over the new keys and values of a layer and attends to whatever it gets back; it
knows nothing of the policy. All frames of one call must pass through every layer before
:meth:`KVCache.commit` ends the step.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from stream3r_core.kernels.quantized import Quantized


class Attended(NamedTuple):
    """Keys and values that the new queries attend to, without any further mask."""

    k: Tensor | Quantized  # [1, heads, N, head_dim]
    v: Tensor | Quantized  # [1, heads, N, head_dim]
    bias: Tensor | None = None  # [1, heads, 1, N] added to the logits; None = zero


class KVCache(ABC):
    """A bounded or growing store of keys and values of several attention layers."""

    #: The network must hand the attention column sums of each layer to :meth:`record`.
    needs_column_sums: bool = False
    #: Fraction of the queries that the column sums are measured with.
    query_fraction: float = 1.0
    #: The network must hand the new queries of each layer to :meth:`record`.
    needs_queries: bool = False
    #: The network must hand what each MLP adds to the new tokens to :meth:`record_update`.
    needs_updates: bool = False
    #: The network must hand world points of the new tokens to :meth:`commit`.
    needs_points: bool = False

    def begin(self, num_frames: int) -> None:  # noqa: B027 - optional hook
        """Announce a step of ``num_frames`` new frames, before the network runs."""

    @abstractmethod
    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Append ``k``, ``v`` [1, heads, n, head_dim] of new tokens and return what they see."""

    def record(  # noqa: B027 - optional hook
        self, layer: int, column_sums: Tensor | None = None, q: Tensor | None = None
    ) -> None:
        """Take what the policy asked for of the attention over the last :meth:`update`.

        ``column_sums`` [1, heads, N] and the queries ``q`` [1, heads, n, head_dim].
        """

    def record_update(self, layer: int, update: Tensor) -> None:  # noqa: B027 - optional hook
        """Take what the MLP of a layer added to the new tokens, [1, n, C]."""

    @abstractmethod
    def commit(
        self, num_frames: int, points: Tensor | None = None, conf: Tensor | None = None
    ) -> None:
        """End the step of ``num_frames`` new frames: evict what the policy does not keep.

        ``points`` [num_frames, H, W, 3] are world points of the new frames at network size and
        ``conf`` [num_frames, H, W] their confidence (>= 1), for policies with ``needs_points``.
        """

    @abstractmethod
    def rollback(self) -> None:
        """Drop what was updated since the last commit: the step failed, the stream goes on."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens; allocated memory is kept."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens that the next frame will find, per layer and head."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the live keys and values, all layers together."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes allocated for the cache, live or not."""
