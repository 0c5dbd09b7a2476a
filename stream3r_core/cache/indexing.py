"""Reading and writing rows of grouped tensors: whole rows at once, not element by element."""

import torch
from torch import Tensor


def flat_index(index: Tensor, num_rows: int) -> Tensor:
    """Return the position [G * n] of row ``index`` [G, n] of each group in stores of G groups."""
    first = torch.arange(len(index), device=index.device)[:, None] * num_rows
    return (index + first).flatten()


def take_rows(store: Tensor, index: Tensor) -> Tensor:
    """Return rows ``index`` [G, n] of ``store`` [G, N, ...]: [G, n, ...]."""
    rows = store.flatten(0, 1).index_select(0, flat_index(index, store.shape[1]))
    return rows.unflatten(0, index.shape)


def put_rows(stores: tuple[Tensor, ...], index: Tensor, values: tuple[Tensor, ...]) -> None:
    """Write to rows ``index`` [G, n] of contiguous stores [G, N, ...].

    The values are [G, n, ...], with G n in any split.
    """
    flat = flat_index(index, stores[0].shape[1])
    for store, value in zip(stores, values):
        rows = value.reshape(-1, *store.shape[2:]).to(store.dtype)
        store.view(-1, *store.shape[2:]).index_copy_(0, flat, rows)
