"""Alternating attention inside each frame and over all frames (Wang et al. 2025, VGGT)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from stream3r_core.config import ModelConfig
from stream3r_core.model.blocks import AttentionFn, Block
from stream3r_core.model.constants import cached_constant
from stream3r_core.model.conv_stem import ConvStem
from stream3r_core.model.rope import rotary_tables
from stream3r_core.model.vit import VisionTransformer


@cached_constant()
def image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [3, 1, 1] of RGB in [0, 1] that the encoders expect."""
    mean = torch.tensor((0.485, 0.456, 0.406), device=device)
    std = torch.tensor((0.229, 0.224, 0.225), device=device)
    return mean[:, None, None], std[:, None, None]


class Aggregator(nn.Module):
    """Images to the token maps that the heads read."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = {'dinov2': VisionTransformer, 'conv': ConvStem}[config.encoder](config)
        # Variant 0 marks the first frame of the sequence, variant 1 all others.
        self.camera_token = nn.Parameter(0.02 * torch.randn(1, 2, 1, dim))
        registers = 0.02 * torch.randn(1, 2, config.num_register_tokens, dim)
        self.register_token = nn.Parameter(registers)
        self.frame_blocks = self._blocks()
        self.global_blocks = self._blocks()

    def _blocks(self) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, qk_norm=True) for _ in range(c.depth)
        )

    def forward(
        self,
        images: Tensor,
        attention: Callable[[int], AttentionFn],
        starts_sequence: bool,
        on_update: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Aggregate images [B, S, 3, H, W] in [0, 1].

        ``attention(layer)`` gives the attention function of a global block, over B sequences of
        S * P tokens. ``starts_sequence``: the first of these frames is the anchor of the sequence.
        ``on_update`` is shown the layer of each global block and what its MLP adds to the tokens.
        Returns the tapped token maps, 4 x [B, S, P, 2C] (frame | global features), and the camera
        tokens of the last layer [B, S, 2C].
        """
        B, S, _, H, W = images.shape
        c = self.config
        x = torch.cat((self._special_tokens(B, S, starts_sequence), self.encode(images)), 2)
        x = x.flatten(0, 1)  # [B * S, P, C]
        P = x.shape[1]
        rows, columns = H // c.patch_size, W // c.patch_size
        rotary = rotary_tables(
            rows, columns, c.num_special_tokens, c.head_dim, c.rope_freq, x.device
        )
        taps = {}
        for layer, (frame_block, global_block) in enumerate(
            zip(self.frame_blocks, self.global_blocks)
        ):
            frame = frame_block(x, rotary=rotary)
            seen = partial(on_update, layer) if on_update is not None else None
            x = global_block(frame.view(B, S * P, -1), attention(layer), rotary, seen)
            x = x.view(B * S, P, -1)
            if layer in c.dpt_layers or layer == c.depth - 1:
                taps[layer] = torch.cat((frame, x), -1).unflatten(0, (B, S))
        return [taps[layer] for layer in c.dpt_layers], taps[c.depth - 1][:, :, 0]

    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, S, 3, H, W] in [0, 1] to patch tokens of the encoder [B, S, N, C]."""
        mean, std = image_statistics(images.device)
        return self.patch_embed(((images - mean) / std).flatten(0, 1)).unflatten(
            0, images.shape[:2]
        )

    def _special_tokens(self, B: int, S: int, starts_sequence: bool) -> Tensor:
        tokens = torch.cat((self.camera_token, self.register_token), 2)  # [1, 2, K, C]
        anchor, other = tokens.split(1, 1)
        first = anchor if starts_sequence else other
        tokens = torch.cat((first, other.expand(-1, S - 1, -1, -1)), 1)
        return tokens.expand(B, -1, -1, -1)  # [B, S, K, C]
