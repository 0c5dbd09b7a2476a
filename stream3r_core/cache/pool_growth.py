"""A token pool that grows with the scene, as published: only without a byte budget."""

from torch import Tensor

from stream3r_core.cache.token_pool import Dropped, TokenPool
from stream3r_core.cache.voxel_table import NOWHERE

GROWTH = 1.5


def with_room_for(pool: TokenPool, dropped: Dropped) -> TokenPool:
    """Return ``pool``, or a larger copy of it that surely holds ``dropped`` too.

    Asks the device how full the pool is: growth cannot be decided without waiting.
    """
    # All that comes may find its row full and have to wait for the next step.
    arriving = dropped.key.shape[1] + int((pool.carried.key < NOWHERE).sum(1).max())
    carry = pool.carried.key.shape[1]
    if carry < arriving:
        carry = int(GROWTH * arriving)
    free_tokens = int((pool.owner[:, :-1] < 0).sum(1).min())
    tokens, voxels = pool.capacity, pool.voxels.capacity
    if free_tokens < arriving:
        tokens = int(GROWTH * tokens) + arriving
    different = dropped.key.unique()
    different = different[different < NOWHERE]
    needed = int(pool.voxels.count) + int((pool.voxels.lookup(different) < 0).sum())
    if needed > voxels:
        voxels = int(GROWTH * needed)
    if (tokens, voxels, carry) == (
        pool.capacity, pool.voxels.capacity, pool.carried.key.shape[1]
    ):  # fmt: skip
        return pool
    return _grown(pool, tokens, voxels, carry)


def _grown(old: TokenPool, num_tokens: int, num_voxels: int, carry: int) -> TokenPool:
    new = TokenPool(
        old.num_groups, num_tokens, num_voxels, old.k.shape[2], old.rule,
        carry, old.k.dtype, old.k.device, tile_bytes=old.tile_bytes,
    )  # fmt: skip
    for name in ('k', 'v', 'weight', 'score_sum', 'count', 'owner', 'table'):
        _copy_into(getattr(new, name), getattr(old, name))
    V = old.voxels.capacity
    new.voxels.keys[:V] = old.voxels.keys
    new.voxels.slots[:V] = old.voxels.slots  # slots from V on are free and stand behind
    new.value[:V] = old.value
    for to, of in zip(new.carried, old.carried):
        to[:, : of.shape[1]] = of
    for to, of in zip(new.books, old.books):
        to.copy_(of)
    return new


def _copy_into(new: Tensor, old: Tensor) -> None:
    """Copy all but the last entry of axis 1, which swallows what is dropped."""
    new[:, : old.shape[1] - 1] = old[:, :-1]
