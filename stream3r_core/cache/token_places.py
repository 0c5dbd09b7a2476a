"""Where in the scene the tokens of a frame are, and how large a voxel is."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stream3r_core.cache.voxel_table import NOWHERE, cell_of, pack
from stream3r_core.config import CacheConfig

TOKEN_SPACINGS = 1.2  # edge of a voxel, in distances between neighbouring tokens


def token_points(
    points: Tensor,  # [n, H, W, 3] world points of new frames, scene units
    conf: Tensor,  # [n, H, W] their confidence, >= 1
    frame_tokens: int,  # T
    num_special: int,  # tokens in front of the patch tokens
    config: CacheConfig,
) -> tuple[Tensor, Tensor]:
    """Return a point [n, T, 3] and a confidence [n, T] per token; NaN and 0 without a place.

    A patch is where its middle is (bilinear, as published: the mean of four pixels). Special
    tokens are nowhere, and so are points that are too uncertain, or not finite.
    """
    height, width = conf.shape[1:]
    stacked = torch.cat((points.permute(0, 3, 1, 2), conf[:, None]), 1).float()
    patch = math.isqrt(height * width // (frame_tokens - num_special))
    grid = height // patch, width // patch
    small = F.interpolate(stacked, size=grid, mode='bilinear', align_corners=False)
    small = small.flatten(2).transpose(1, 2)  # [n, h w, 4]
    place, sure = small[..., :3], small[..., 3]
    valid = (sure > config.min_confidence) & place.isfinite().all(-1) & sure.isfinite()
    if config.guard_points:
        usual = sure.masked_fill(~valid, torch.nan)
        valid &= sure >= usual.nanquantile(config.confidence_quantile, dim=1, keepdim=True)
    place = place.masked_fill(~valid[..., None], torch.nan)
    return F.pad(place, (0, 0, num_special, 0), value=torch.nan), F.pad(
        sure.masked_fill(~valid, 0.0), (num_special, 0)
    )


class VoxelSize:
    """The voxel edge in scene units, a scalar on the device; NaN while nothing tells it.

    Unless ``voxel_size`` fixes it, it is a fraction of the median depth of the first frames, until
    :meth:`freeze`: from then on voxels have names. The fraction is ``voxel_fraction``, or follows
    from the angle between neighbouring tokens, so that a voxel is a little larger than what a
    token sees at that depth, whatever the resolution. Frames without places do not count.
    """

    def __init__(self, config: CacheConfig, device: torch.device):
        self._config = config
        self.edge, self._sum = (torch.zeros((), device=device) for _ in range(2))
        self._num_edges = torch.zeros((), dtype=torch.int64, device=device)
        self._is_frozen = torch.zeros((), dtype=torch.bool, device=device)
        self.reset()

    def tensors(self) -> list[Tensor]:
        """Return everything that is allocated."""
        return [self.edge, self._sum, self._num_edges, self._is_frozen]

    def observe(self, places: Tensor) -> None:
        """Take the places [n, T, 3] of the tokens of new frames, world = first camera."""
        if self._config.voxel_size:
            return
        depth = places[..., 2].abs()  # [n, T]
        fraction = self._config.voxel_fraction
        if not fraction:
            steps = (places[:, 1:] - places[:, :-1]).norm(dim=-1) / depth[:, 1:]
            fraction = TOKEN_SPACINGS * steps.nanmedian(1).values
        edges = fraction * depth.nanmedian(1).values  # [n]
        counts = edges.isfinite() & (edges > 0) & ~self._is_frozen
        self._sum += edges.where(counts, 0.0).sum()
        self._num_edges += counts.sum()
        self.edge.copy_(self._sum / self._num_edges)

    def freeze(self) -> None:
        """Fix the edge, if it is known: tokens are about to be stored under it."""
        self._is_frozen |= self._num_edges > 0

    def keys(self, places: Tensor) -> Tensor:
        """Return the voxel keys [...] of places [..., 3]; NOWHERE where NaN."""
        keys = pack(cell_of(places, self.edge))
        return keys.masked_fill((places / self.edge).isnan().any(-1), NOWHERE)

    def reset(self) -> None:
        """Forget the scene."""
        self.edge.fill_(self._config.voxel_size or torch.nan)
        self._sum.zero_()
        self._num_edges.zero_()
        self._is_frozen.fill_(False)
