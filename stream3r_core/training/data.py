"""Batches as a pure function of (seed, draw, process): a resumed run sees the same data."""

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stream3r_core.errors import ConfigError
from stream3r_core.synthetic import ClipConfig, sample_clips
from stream3r_core.training.batch import Batch
from stream3r_core.training.folders import SceneFolder
from stream3r_core.training.settings import MOTIONS, StageConfig, TrainingConfig

TRAINING_TEXTURES = 0
HELD_OUT_TEXTURES = 7
HELD_OUT_FPS = 10.0
#: Generators of a CPU look at 32 bits of a seed. Held-out seeds are the lowest of them, with a
#: high bit that only says so; training draws others.
HELD_OUT_SEED = 1 << 40
_HELD_OUT_SEEDS, _ALL_SEEDS = 1 << 24, 1 << 32
_HELD_OUT_BATCH = 4


class DataMixture:
    """Synthetic rooms and folders, mixed by weight; held-out sequences are rendered once."""

    def __init__(
        self, config: TrainingConfig, process: int = 0, device: str | torch.device = 'cpu'
    ):
        self.config, self.process, self.device = config, process, device
        self.folders = [SceneFolder(f) for f in config.folders if f.weight > 0]
        self.weights = [
            config.synthetic_weight,
            *(f.weight for f in config.folders if f.weight > 0),
        ]
        if not sum(self.weights) > 0:
            raise ConfigError('no training data: synthetic_weight and all folder weights are 0')
        self._held_out: tuple[StageConfig, list[Batch]] | None = None

    @torch.no_grad()
    def batch(self, step: int, draw: int) -> Batch:
        """Return the batch number ``draw``, in the stage of ``step``."""
        stage, config = self.config.stage_at(step), self.config
        # All processes draw the same source and clip length: their steps take equally long.
        rng = random.Random(step_seed(config.seed, draw, purpose='batch'))
        source = rng.choices([None, *self.folders], self.weights)[0]
        frames = rng.choice(stage.frames)
        count = max(1, stage.batch * min(stage.frames) // frames)
        seed = step_seed(config.seed, draw, self.process)
        if source is not None:
            return source.batch(count, frames, tuple(stage.size_hw), seed).to(self.device)
        rng = random.Random(step_seed(config.seed, draw, self.process, 'clip'))
        clip = clip_config(stage, frames, rng, config.compile_renderer)
        return rendered(count, clip, seed, self.device)

    def held_out(self, step: int) -> list[Batch]:
        """Return the validation sequences at the image size of ``step``."""
        stage = self.config.stage_at(step)
        if self._held_out is None or self._held_out[0] != stage:
            self._held_out = (stage, list(held_out_batches(self.config, stage, self.device)))
        return self._held_out[1]


def step_seed(seed: int, draw: int, process: int = 0, purpose: str = 'content') -> int:
    """Hash into one seed that no held-out sequence has.

    What is drawn for different purposes must not hang together: with one seed for source and scene
    a mixture would show half of the scenes only.
    """
    digest = hashlib.blake2b(f'{seed} {draw} {process} {purpose}'.encode(), digest_size=8)
    number = int.from_bytes(digest.digest(), 'little')
    return _HELD_OUT_SEEDS + number % (_ALL_SEEDS - _HELD_OUT_SEEDS)


@dataclass(frozen=True)
class Visibility:
    """What frames see of each other in one step, and what is seen of them."""

    mode: str = 'causal'  # or 'window', 'full'
    window: int = 1
    keep: float = 1.0  # share of the tokens of past frames, mode causal only
    dense_share: float = 1.0  # share of the frames whose dense maps are made and judged
    seed: int = 0  # of what else is drawn in the step, such as which tokens

    @classmethod
    def draw(cls, stage: StageConfig, seed: int, draw: int) -> 'Visibility':
        """Draw it for a step, the same on every process."""
        mixed = step_seed(seed, draw, purpose='visibility')
        rng = random.Random(mixed)
        window, keep = rng.choice(stage.windows), rng.choice(stage.keep)
        return dataclasses.replace(
            cls.of(window),
            keep=1.0 if window else keep,
            dense_share=stage.dense_share,
            seed=mixed,
        )

    def dense_frames(self, frames: int) -> Tensor | None:
        """Return which of the frames of a clip have dense maps, in order; None: all."""
        count = max(2, round(self.dense_share * frames))
        if count >= frames:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(frames, generator=generator)[:count].sort().values

    @classmethod
    def of(cls, window: int) -> 'Visibility':
        """Return what an attention window of a recipe means."""
        if window:
            return cls('window', window) if window > 0 else cls('full')
        return cls('causal')


def clip_config(stage: StageConfig, frames: int, rng: random.Random, compiled: bool) -> ClipConfig:
    """Draw what is common to the clips of one batch."""
    return ClipConfig(
        height=stage.size_hw[0],
        width=stage.size_hw[1],
        frames=frames,
        fps=frame_rate(stage, frames, rng),
        fov_deg=tuple(stage.fov_deg),
        principal_shift=stage.principal_shift,
        room_half_m=tuple(stage.room_half_m),
        kind=rng.choice(stage.worlds),
        motion=MOTIONS[rng.choice(stage.motions)],
        moving=stage.moving,
        shadows=stage.shadows,
        compiled=compiled,
        texture_seed=TRAINING_TEXTURES,
    )


def frame_rate(stage: StageConfig, frames: int, rng: random.Random) -> float:
    """Draw the frame rate of a clip, Hz; none lasts longer than the stage allows."""
    slowest, fastest = stage.fps
    if stage.longest_s:
        slowest = min(max(slowest, (frames - 1) / stage.longest_s), fastest)
    return math.exp(rng.uniform(math.log(slowest), math.log(fastest)))


def rendered(count: int, clip: ClipConfig, seed: int, device: str | torch.device) -> Batch:
    """Render ``count`` clips."""
    clips = sample_clips(count, clip, seed, device)
    return Batch(clips.images, clips.depth_m, clips.T_world_camera, clips.K)


def held_out_batches(
    config: TrainingConfig, stage: StageConfig, device: str | torch.device = 'cpu'
) -> Iterator[Batch]:
    """Yield the fixed validation sequences: rooms and textures never trained on."""
    clip = ClipConfig(
        height=stage.size_hw[0],
        width=stage.size_hw[1],
        frames=config.validation_frames,
        fps=HELD_OUT_FPS,
        fov_deg=tuple(stage.fov_deg),
        room_half_m=tuple(stage.room_half_m),
        motion=MOTIONS[stage.motions[0]],
        texture_seed=HELD_OUT_TEXTURES,
    )
    for done in range(0, config.validation_scenes, _HELD_OUT_BATCH):
        count = min(_HELD_OUT_BATCH, config.validation_scenes - done)
        yield rendered(count, clip, HELD_OUT_SEED + done, device)
