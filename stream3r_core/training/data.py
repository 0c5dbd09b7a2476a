"""Batches as a pure function of (seed, step, process): a resumed run sees the same data."""

import random

import torch

from stream3r_core.errors import ConfigError
from stream3r_core.synthetic import DRONE, HAND_HELD, WHEELED, ClipConfig, sample_clips
from stream3r_core.training.batch import Batch
from stream3r_core.training.settings import StageConfig, TrainingConfig

MOTIONS = {'hand_held': HAND_HELD, 'wheeled': WHEELED, 'drone': DRONE}
TRAINING_TEXTURES = 0
HELD_OUT_TEXTURES = 7
_HELD_OUT_SEED = 1 << 40


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """Mix into one seed below 2**40: held-out seeds lie above."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + process * 0xC2B2AE3D + 12345) % _HELD_OUT_SEED


def synthetic_batch(
    stage: StageConfig, seed: int, step: int, process: int = 0, device='cpu', compiled: bool = False
) -> Batch:
    """Draw the batch of one step from ``stage``."""
    mixed = step_seed(seed, step, process)
    rng = random.Random(mixed)
    frames = rng.choice(stage.frames)
    kind = rng.choice(stage.kinds)
    if kind not in MOTIONS:
        raise ConfigError(f'unknown way to carry a camera {kind!r}; known: {", ".join(MOTIONS)}')
    config = ClipConfig(
        height=stage.size_hw[0],
        width=stage.size_hw[1],
        frames=frames,
        fps=rng.uniform(*stage.fps),
        fov_deg=tuple(stage.fov_deg),
        room_half_m=tuple(stage.room_half_m),
        motion=MOTIONS[kind],
        moving=stage.moving,
        shadows=stage.shadows,
        compiled=compiled,
        texture_seed=TRAINING_TEXTURES,
    )
    batch = max(1, stage.batch * min(stage.frames) // frames)
    clips = sample_clips(batch, config, mixed, device)
    return Batch(clips.images, clips.depth_m, clips.T_world_camera, clips.K)


def attention_of(stage: StageConfig, seed: int, step: int) -> tuple[str, int]:
    """Draw mode and window of one step, the same on every process."""
    window = random.Random(step_seed(seed, step) ^ 0x5A5A5A).choice(stage.windows)
    return ('window', window) if window else ('causal', 1)


def held_out_batches(config: TrainingConfig, stage: StageConfig, fps: float = 10.0, batch: int = 4):
    """Yield the fixed validation sequences: rooms and textures never trained on."""
    done = 0
    while done < config.validation_scenes:
        count = min(batch, config.validation_scenes - done)
        clip = ClipConfig(
            height=stage.size_hw[0],
            width=stage.size_hw[1],
            frames=config.validation_frames,
            fps=fps,
            fov_deg=tuple(stage.fov_deg),
            room_half_m=tuple(stage.room_half_m),
            texture_seed=HELD_OUT_TEXTURES,
        )
        clips = sample_clips(count, clip, _HELD_OUT_SEED + done)
        yield Batch(clips.images, clips.depth_m, clips.T_world_camera, clips.K)
        done += count


def training_batch(config: TrainingConfig, step: int, process: int, device) -> Batch:
    """Draw the batch of ``step`` from the sources, mixed by weight."""
    return synthetic_batch(
        config.stage_at(step), config.seed, step, process, device, config.compile_renderer
    )


def seed_everything(seed: int) -> None:
    """Seed the weights of a network made next."""
    torch.manual_seed(seed)
