"""The bounded cache with a spatial memory: constant memory for an endless stream.

The method is STAC (arXiv 2603.20284). Recent frames stay whole; of older ones the most attended
tokens stay ("heavy hitters"); the others are merged by voxel in a pool, from which a fixed number
is brought back for every step. :class:`stream3r_core.config.CacheConfig` names every size and
every switch between the published rules and the repaired ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stream3r_core.cache import retrieval, voxel_value
from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.cache.budget import Plan, make_plan
from stream3r_core.cache.frame_slots import number_frames
from stream3r_core.cache.pool_growth import with_room_for
from stream3r_core.cache.token_places import VoxelSize, token_points
from stream3r_core.cache.token_pool import TokenPool
from stream3r_core.cache.voxel_table import NOWHERE
from stream3r_core.cache.working import WorkingCache
from stream3r_core.config import CacheConfig
from stream3r_core.errors import CacheError

NEIGHBOURHOOD = 2  # cells around the recent ones, Chebyshev (published: 2 r / r)
VALUE_DECAY = 0.98  # of what speaks for keeping a voxel, per step


class StacCache(KVCache):
    """Keys and values of the global attention layers within a fixed number of bytes.

    Storage is allocated at the first update, when the size of a frame and the type are known.
    ``num_special`` tokens of a frame stand in front of its patch tokens; ``reserved_bytes`` of the
    budget are taken by others (the camera cache). A step is ``begin``, ``update`` and ``record``
    per layer, then ``commit`` or ``rollback``. Frames are numbered by their entry into the cache.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        num_special: int,
        config: CacheConfig,
        reserved_bytes: int = 0,
    ):
        self.config = config
        self.num_special = num_special
        self.num_frames = 0
        self._shape = layers, heads, head_dim
        self._reserved_bytes = reserved_bytes
        self._step_frames = 1
        self.plan: Plan | None = None
        self.working: WorkingCache | None = None
        self.pool: TokenPool | None = None
        scored = config.heavy_hitters > 0 or config.retrieved != 0
        self.needs_column_sums = scored and config.score == 'attention'
        self.needs_updates = scored and config.score == 'residual'
        self.needs_points = config.retrieved != 0
        self.needs_queries = config.retrieved > 0 and config.query_retrieval
        self.query_fraction = config.query_fraction

    # ---- one step

    def begin(self, num_frames: int) -> None:
        """Announce how many frames the next updates bring."""
        self._step_frames = num_frames

    def update(self, layer: int, k: Tensor, v: Tensor) -> Attended:
        """Write the new tokens k, v [1, H, n T, D] and return all that they see."""
        if self.num_frames == 0 and layer == 0:
            self._fit_storage(k)
        if not self.working.slots.open:
            self.working.begin(self._step_frames)
        expected = self._step_frames * self.plan.layout.frame_tokens
        if k.shape[2] != expected:
            raise CacheError(
                f'expected {expected} tokens of {self._step_frames} frames, got {k.shape[2]}; a '
                'stream has one image size: reset the session to go on with another'
            )
        self.working.write(layer, k, v)
        return self.working.attended(layer)

    def record(
        self, layer: int, column_sums: Tensor | None = None, q: Tensor | None = None
    ) -> None:
        """Take the attention that each token received, and the mean of the queries."""
        if column_sums is not None:
            self.working.record(layer, column_sums)
        if q is not None:
            self.query[layer] = q[0].mean(1, dtype=torch.float32)

    def record_update(self, layer: int, update: Tensor) -> None:
        """Score the new tokens by the size of what the MLP added to them; 1.0 is the mean."""
        size = torch.linalg.vector_norm(update[0], dim=-1, dtype=torch.float32)
        self.working.record_scores(layer, size / size.mean().clamp_min(1e-12))

    def commit(
        self,
        num_frames: int,
        points: Tensor | None = None,
        conf: Tensor | None = None,
        keep: Sequence[bool] | None = None,
    ) -> None:
        """End the step: score, evict, merge into the pool, retrieve for the next step.

        Frames that are not to be ``keep``-ed leave no trace; without any kept frame the cache is
        what it was before the step.
        """
        keep = [True] * num_frames if keep is None else keep
        if not any(keep):
            self.rollback()
            return
        frames = number_frames(self.num_frames, keep)
        first_frame = self.num_frames
        opened = self.working.slots.open
        self._credit_retrieved()
        # The size of an update is a property of the token: it neither decays nor adds up.
        self.working.close(frames, self.config.score_decay if self.needs_column_sums else None)
        if self.needs_points:
            self._place(opened, points, conf, keep)
        self.num_frames += sum(keep)
        if self.config.query_retrieval:
            self._evict()
            self._retrieve_by_query()
        else:
            self._retrieve_by_weight(first_frame)
            self._evict()

    def rollback(self) -> None:
        """Forget the open step."""
        if self.plan is not None:
            self.working.abandon()

    def reset(self) -> None:
        """Forget the stream; storage stays."""
        self.num_frames = 0
        if self.plan is None:
            return
        self.working.abandon()
        self.working.clear()
        self._chunks = 0
        self._pool_is_empty = True
        if self.pool is not None:
            self.pool.clear()
            self.voxel_size.reset()

    def _fit_storage(self, k: Tensor) -> None:
        """Allocate for frames like this one, unless that has been done."""
        frame_tokens = k.shape[2] // self._step_frames
        fits = (
            self.plan is not None
            and (self.plan.layout.frame_tokens, self.plan.dtype) == (frame_tokens, k.dtype)
            and self.working.kv.device == k.device
        )
        if not fits:
            self.plan = self.working = self.pool = None  # free the old storage first
            plan = make_plan(self._shape, frame_tokens, k.dtype, self.config, self._reserved_bytes)
            self._allocate(plan, k.device)

    def _allocate(self, plan: Plan, device: torch.device) -> None:
        layout, config = plan.layout, self.config
        self.working, self.pool = plan.allocate(device)
        if self.pool is not None:
            self.voxel_size = VoxelSize(config, device)
            shape = layout.frame_slots, layout.frame_tokens
            self.place = torch.full((*shape, 3), torch.nan, device=device)
            self.sureness = torch.zeros(shape, device=device)
            self.query = torch.zeros(layout.layers, layout.heads, layout.head_dim, device=device)
        self._chunks = 0
        self._pool_is_empty = True
        self.plan = plan

    # ---- what happens at the end of a step

    def _place(
        self,
        opened: list[int],
        points: Tensor | None,
        conf: Tensor | None,
        keep: Sequence[bool],
    ) -> None:
        """Remember where the tokens of the new frames that are kept are."""
        if points is None or conf is None:
            raise CacheError('the spatial memory needs world points; run the point head too')
        place, sureness = token_points(
            points, conf, self.plan.layout.frame_tokens, self.num_special, self.config
        )
        for i, slot in enumerate(opened):
            if keep[i]:
                self.voxel_size.observe(place[i : i + 1])
                self.place[slot] = place[i]
                self.sureness[slot] = sureness[i]

    def _evict(self) -> None:
        """Let go what left the window; what is no heavy hitter goes into the pool."""
        first_recent = self.num_frames - self.config.window
        in_slots = self.working.slots.slot_of
        leaving = [f for f in in_slots if f < first_recent and f not in self.config.pinned_frames]
        if not leaving:
            return
        if self.pool is None:
            tokens = len(leaving) * self.plan.layout.frame_tokens
            self.working.evict(leaving, self.working.heavy_key.new_full((tokens,), NOWHERE))
            return
        self.voxel_size.freeze()
        slots = [in_slots[f] for f in leaving]
        keys = self.voxel_size.keys(torch.cat([self.place[s] for s in slots]))
        dropped = self.working.evict(leaving, keys)
        if dropped is None:
            return
        if not self.config.bounded:
            self.pool = with_room_for(self.pool, dropped)
        self.pool.insert(dropped)
        self._pool_is_empty = False
        sureness = torch.cat([self.sureness[s] for s in slots])
        sureness = sureness / sureness.mean().clamp_min(1e-6)
        voxel_value.observe(self.pool.value, self.pool.voxels.lookup(keys), sureness)

    def _credit_retrieved(self) -> None:
        """Value the voxels whose tokens were attended to."""
        if self.pool is None or self._pool_is_empty:
            return
        self.pool.value.mul_(VALUE_DECAY)
        if not self.needs_column_sums:
            return
        layout = self.plan.layout
        received = self.working.received[..., layout.hot :]
        queries = len(self.working.slots.open) * layout.frame_tokens
        # 1 = the tokens of this voxel drew, in the mean head, the attention of one uniform key.
        share = received * (layout.total / queries / self.pool.num_groups)
        if layout.pooled:
            slots = self.pool.owner.unflatten(0, share.shape[:2])
        else:
            slots = self.working.retrieved_slot
        voxel_value.add_by_slot(self.pool.value, slots.long(), share)

    def _near(self) -> Tensor:
        """Return which voxels lie around what the recent frames see."""
        first_recent = self.num_frames - self.config.window
        slots = [s for f, s in self.working.slots.slot_of.items() if f >= first_recent]
        keys = self.voxel_size.keys(torch.cat([self.place[s] for s in slots]))
        return self.pool.voxels.near(keys, NEIGHBOURHOOD)

    @property
    def _max_log_count(self) -> float:
        return self.config.max_log_count if self.config.sound_merging else torch.inf

    def _retrieve_by_query(self) -> None:
        """Bring back what the queries of this step ask for (the repaired rule)."""
        if self.pool is None or self._pool_is_empty:
            return
        if self.plan.layout.pooled:  # no choice to make
            self.working.show_pool(retrieval.bias_in_place(self.pool, self._max_log_count))
            return
        rank = retrieval.rank_by_query(
            self.pool, self.query.flatten(0, 1), self._near(), self._max_log_count
        )
        self._set_retrieved(rank)

    def _retrieve_by_weight(self, first_frame: int) -> None:
        """Bring back the most merged tokens near by (the published rule and timing)."""
        c = self.config
        self._chunks += 1
        begins = max(c.chunk_size + len(c.pinned_frames) + c.window + c.heavy_hitters, 16)
        due = self._chunks % max(1, c.window // c.chunk_size) == 0
        if self.pool is None or self._pool_is_empty or first_frame <= begins or not due:
            return
        self._set_retrieved(retrieval.rank_by_weight(self.pool, self._near()))

    def _set_retrieved(self, rank: Tensor) -> None:
        found = retrieval.retrieve(
            self.pool, rank, self.plan.layout.retrieved, self._max_log_count
        )
        self.working.set_retrieved(found)

    # ---- sizes

    def tensors(self) -> list[Tensor]:
        """Return everything that is allocated."""
        if self.plan is None:
            return []
        if self.pool is None:
            return self.working.tensors()
        own = self.place, self.sureness, self.query, *self.voxel_size.tensors()
        return [*self.working.tensors(), *own, *self.pool.tensors()]

    @property
    def num_tokens(self) -> int:
        """Tokens per layer and head that the next frame will find, at most (waits)."""
        if self.plan is None:
            return 0
        layout, seen = self.plan.layout, self.working.retrieved_slot.flatten(0, 1)
        if layout.pooled and not self._pool_is_empty:
            seen = self.pool.owner
        return self.working.num_hot + int((seen >= 0).sum(1).max())

    @property
    def num_bytes(self) -> int:
        """Bytes of all live keys and values: hot, retrieved and in the pool (waits)."""
        if self.plan is None:
            return 0
        groups = self.plan.layout.layers * self.plan.layout.heads
        live = groups * self.working.num_hot + int((self.working.retrieved_slot >= 0).sum())
        if self.pool is not None:
            live += int(self.pool.num_tokens)
        return live * self.plan.token_bytes // groups

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated: keys, values, scores, masks, tables."""
        return sum(x.nbytes for x in self.tensors())
