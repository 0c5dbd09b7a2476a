"""Both profiles written with lists and loops: what the tensors of the package must equal.

Follows the design text (stac.md sections 2 to 5) with one Python object per token, and the row
update of :mod:`kernels.merge_reference`.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from stream3r_core.cache.base import Attended, KVCache
from stream3r_core.kernels.merge_reference import MergeRule, Row, Token, update_row


@dataclass(eq=False)
class Hot:
    """A token of the working cache of one head."""

    key: torch.Tensor
    value: torch.Tensor
    frame: int
    cell: tuple | None = None
    score: float = 0.0


@dataclass
class Head:
    """What one head of one layer remembers."""

    hot: list = field(default_factory=list)
    retrieved: list = field(default_factory=list)  # (key, value, bias)
    rows: dict = field(default_factory=dict)  # cell -> Row
    carried: dict = field(default_factory=dict)  # cell -> list of tokens


class PublishedOracle(KVCache):
    """One step is: attend, score, place, retrieve for the next step, prune, merge."""

    needs_column_sums = True
    needs_points = True

    def __init__(self, layers, heads, tokens, special, config):
        self.heads = [[Head() for _ in range(heads)] for _ in range(layers)]
        self.T, self.special, self.config = tokens, special, config
        self.num_frames = self.chunks = 0
        self.rule = MergeRule(
            config.buffer_size, config.num_pivots, config.absorb_threshold, config.drop_gate,
            config.sound_merging,
        )  # fmt: skip
        self.received = {}

    def update(self, layer, k, v):
        for h, head in enumerate(self.heads[layer]):
            for i in range(k.shape[2]):
                frame = self.num_frames + i // self.T
                head.hot.append(Hot(k[0, h, i].clone(), v[0, h, i].clone(), frame))
        keys, values, bias = [], [], []
        for head in self.heads[layer]:
            keys.append(torch.stack([t.key for t in head.hot] + [r[0] for r in head.retrieved]))
            values.append(
                torch.stack([t.value for t in head.hot] + [r[1] for r in head.retrieved])
            )
            bias.append(torch.tensor([0.0] * len(head.hot) + [r[2] for r in head.retrieved]))
        longest = max(len(b) for b in bias)
        pad = [longest - len(b) for b in bias]
        k = torch.stack([F.pad(x, (0, 0, 0, n)) for x, n in zip(keys, pad)])[None]
        v = torch.stack([F.pad(x, (0, 0, 0, n)) for x, n in zip(values, pad)])[None]
        b = torch.stack([F.pad(x, (0, n), value=-torch.inf) for x, n in zip(bias, pad)])
        return Attended(k, v, b[None, :, None])

    def record(self, layer, column_sums=None, q=None):
        self.received[layer] = column_sums[0]

    def commit(self, num_frames, points=None, conf=None, keep=None):
        self.chunks += 1
        first = self.score(num_frames, points, conf)
        self.retrieve(first)
        self.evict()

    def score(self, num_frames, points, conf):
        """Score all tokens and place the new ones; return the number of the first new frame."""
        first = self.num_frames
        self.num_frames += num_frames
        cells = self.cells(points, conf)
        for layer, heads in enumerate(self.heads):
            for h, head in enumerate(heads):
                new = num_frames * self.T
                for i, token in enumerate(head.hot):
                    received = float(self.received[layer][h, i]) * len(head.hot) / new
                    token.score = self.config.score_decay * token.score + received
                for token, cell in zip(head.hot[-new:], cells):
                    token.cell = cell
        return first

    def evict(self):
        for heads in self.heads:
            for head in heads:
                self.merge(head, self.prune(head))

    def cells(self, points, conf):
        """Return the voxel of every new token, None for those without a place."""
        stacked = torch.cat((points.permute(0, 3, 1, 2), conf[:, None]), 1)
        patches = self.T - self.special
        side = math.isqrt(conf.shape[1] * conf.shape[2] // patches)
        size = conf.shape[1] // side, conf.shape[2] // side
        small = F.interpolate(stacked, size=size, mode='bilinear').flatten(2)
        cells = []
        for frame in small:
            cells += [None] * self.special
            least = self.least_confidence(frame[3])
            for x, y, z, sure in frame.T.tolist():
                cell = tuple(math.floor(c / self.config.voxel_size) for c in (x, y, z))
                cells.append(cell if sure > self.config.min_confidence and sure >= least else None)
        return cells

    def least_confidence(self, sure):
        c = self.config
        if not c.guard_points:
            return 0.0
        return float(sure[sure > c.min_confidence].quantile(c.confidence_quantile))

    def prune(self, head):
        c = self.config
        recent = range(self.num_frames - c.window, self.num_frames)
        kept = [t for t in head.hot if t.frame in c.pinned_frames or t.frame in recent]
        others = [t for t in head.hot if t not in kept]
        ranked = sorted(others, key=lambda t: -t.score)  # stable: older first
        heavy = ranked[: c.heavy_hitters * self.T]
        head.hot = [t for t in head.hot if t in kept or t in heavy]
        return [t for t in others if t not in heavy]

    def merge(self, head, dropped):
        arrived = {}
        for token in dropped:
            if token.cell is not None:
                arrived.setdefault(token.cell, []).append(
                    Token(token.key, token.value, token.score)
                )
        for cell in arrived.keys() | head.carried.keys():
            offered = arrived.get(cell, []) + head.carried.get(cell, [])
            row = head.rows.get(cell, Row())
            head.rows[cell], head.carried[cell], _ = update_row(row, offered, self.rule)

    def retrieve(self, first):
        c = self.config
        begins = max(c.chunk_size + len(c.pinned_frames) + c.window + c.heavy_hitters, 16)
        if first <= begins or self.chunks % max(1, c.window // c.chunk_size):
            return
        centres = self.recent_cells()
        for heads in self.heads:
            for head in heads:
                near = [row for cell, row in head.rows.items() if is_near(cell, centres)]
                pivots = sorted((p for r in near for p in r.pivots), key=lambda p: -p.weight)
                tokens = sorted((t for r in near for t in r.buffer), key=lambda t: -t.score)
                found = [(p.key, p.value, math.log(p.count)) for p in pivots]
                found += [(t.key, t.value, 0.0) for t in tokens]
                head.retrieved = found[: c.retrieved * self.T]

    def recent_cells(self):
        recent = range(self.num_frames - self.config.window, self.num_frames)
        hot = self.heads[0][0].hot
        return {t.cell for t in hot if t.frame in recent and t.cell is not None}

    def rollback(self):
        raise NotImplementedError

    reset = rollback
    num_tokens = num_bytes = capacity_bytes = property(rollback)


class RepairedOracle(PublishedOracle):
    """One step is: attend, score, place, prune, merge, retrieve what the queries ask for.

    ``tiers`` notes which ranks were retrieved (2: near pivots, 1: near tokens, 0: others), and
    ``num_capped`` how many weights had been above the cap.
    """

    needs_queries = True

    def __init__(self, *args):
        super().__init__(*args)
        self.query = {}
        self.tiers, self.num_capped = set(), 0

    def record(self, layer, column_sums=None, q=None):
        super().record(layer, column_sums)
        self.query[layer] = q[0].mean(1)  # [H, D]

    def commit(self, num_frames, points=None, conf=None, keep=None):
        self.score(num_frames, points, conf)
        self.evict()
        self.retrieve_by_query()

    def retrieved_keys(self):
        """Return per layer and head the keys of what is retrieved [n, D], best first."""
        heads = (head for heads in self.heads for head in heads)
        nothing = self.query[0].new_zeros(0, self.query[0].shape[1])
        return [
            torch.stack([r[0] for r in h.retrieved]) if h.retrieved else nothing for h in heads
        ]

    def retrieve_by_query(self):
        c, centres = self.config, self.recent_cells()
        for layer, heads in enumerate(self.heads):
            for head, query in zip(heads, self.query[layer]):
                ranked = []
                for cell, row in head.rows.items():
                    near = is_near(cell, centres)
                    found = [(p.key, p.value, p.count, 2 * near) for p in row.pivots]
                    found += [(t.key, t.value, 1, 1 * near) for t in row.buffer]
                    for key, value, count, tier in found:
                        bias = min(math.log(count), c.max_log_count)
                        logit = float(key @ query) / math.sqrt(len(key)) + bias
                        ranked.append((tier, logit, key, value, bias, count))
                ranked.sort(key=lambda r: r[:2], reverse=True)
                chosen = ranked[: c.retrieved * self.T]
                head.retrieved = [(key, value, bias) for _, _, key, value, bias, _ in chosen]
                if len(ranked) > len(chosen):
                    self.tiers |= {tier for tier, *_ in chosen}
                self.num_capped += sum(math.log(r[-1]) > c.max_log_count for r in chosen)


def is_near(cell, centres):
    """Whether a cell is at most two cells, along any axis, from one of the centres."""
    return any(max(abs(a - b) for a, b in zip(cell, centre)) <= 2 for centre in centres)
