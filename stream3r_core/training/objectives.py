"""What is minimised: each objective maps (network, batch, visibility) to named, weighted terms."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stream3r_core.checkpoints import load_model
from stream3r_core.config import model_config
from stream3r_core.errors import ConfigError
from stream3r_core.model.blocks import AttentionFn
from stream3r_core.model.visibility import FrameAttention, visible_window
from stream3r_core.training.attention_rules import ForgettingAttention
from stream3r_core.training.batch import Batch, make_targets
from stream3r_core.training.data import Visibility
from stream3r_core.training.dense_loss import dense_loss
from stream3r_core.training.distillation import distillation_loss
from stream3r_core.training.matching import RecordingAttention, matching_loss
from stream3r_core.training.precision import precision_of
from stream3r_core.training.published_loss import points_loss, published_loss
from stream3r_core.training.settings import TrainingConfig

Objective = Callable[[nn.Module, Batch, Visibility], dict[str, Tensor]]

_NUM_QUERIES = 64


def make_objective(config: TrainingConfig, device: torch.device) -> Objective:
    """Return the objective that the recipe names."""
    if config.loss == 'dense':
        return DenseObjective(config)
    if config.loss in ('stream3r', 'points'):
        loss = published_loss if config.loss == 'stream3r' else points_loss
        return lambda model, batch, sight: loss(
            model(batch.images, mode=sight.mode, window=sight.window), batch
        )
    return _distillation(config, device)


class DenseObjective:
    """The dense loss, with taught matching and forgetful attention where the recipe wants them."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        sizes = config.model or model_config(config.preset)
        self.patch_size, self.num_special = sizes.patch_size, sizes.num_special_tokens
        for taught in config.taught:
            if taught.layer >= sizes.depth or taught.head >= sizes.num_heads:
                raise ConfigError(
                    f'{taught}: the network has global blocks 0 to {sizes.depth - 1} with heads '
                    f'0 to {sizes.num_heads - 1}'
                )

    def __call__(self, model: nn.Module, batch: Batch, sight: Visibility) -> dict[str, Tensor]:
        """Return the terms."""
        attention = RecordingAttention(self._rules(batch, sight), self.config.taught)
        shown = sight.dense_frames(batch.images.shape[1])
        answer = model(
            batch.images,
            mode=sight.mode,
            window=sight.window,
            global_attention=attention,
            dense_frames=shown,
        )
        terms = dense_loss(answer, make_targets(batch).dense_at(shown), self.config.dense)
        if attention.seen:
            entropy, distance = matching_loss(
                attention.seen, batch, self.patch_size, self.num_special
            )
            terms['matching'] = self.config.match_weight * entropy
            terms['match_position'] = self.config.match_position_weight * distance
        return terms

    def _rules(self, batch: Batch, sight: Visibility) -> Callable[[int], AttentionFn]:
        frames = batch.images.shape[1]
        if sight.keep < 1:
            return ForgettingAttention(frames, sight.keep, sight.seed, self.num_special)
        rule = FrameAttention(frames, visible_window(sight.mode, sight.window, frames))
        return lambda layer: rule


def _distillation(config: TrainingConfig, device: torch.device) -> Objective:
    """Follow a frozen network of the same architecture that sees all frames."""
    if not config.teacher:
        raise ConfigError(
            "loss 'distill' needs a teacher: give its weights, for example facebook/VGGT-1B"
        )
    teacher = load_model(config.model or config.preset, config.teacher, device)
    has_tracks = teacher.config.track is not None

    def objective(model: nn.Module, batch: Batch, sight: Visibility) -> dict[str, Tensor]:
        queries = query_pixels(batch.valid[:, 0], sight.seed) if has_tracks else None
        with torch.no_grad(), precision_of(config, device):
            wanted = teacher(batch.images, mode='full', query_points=queries)
        answer = model(batch.images, mode=sight.mode, window=sight.window, query_points=queries)
        return distillation_loss(answer, wanted, batch.valid)

    return objective


def query_pixels(valid: Tensor, seed: int, count: int = _NUM_QUERIES) -> Tensor:
    """Draw ``count`` known pixels (x, y) of each first view; zeros where too few are known.

    valid [B, H, W] bool; returns [B, count, 2] float32, the same for the same seed.
    """
    b, _, width = valid.shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(b, valid[0].numel(), generator=generator).to(valid.device)
    scores = scores * valid.flatten(1)
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    pixels = torch.stack([best.indices % width, best.indices // width], -1).float()
    pixels = torch.nn.functional.pad(pixels, (0, 0, 0, count - pixels.shape[1]))
    enough = valid.flatten(1).sum(1) >= count
    return pixels * enough[:, None, None]
