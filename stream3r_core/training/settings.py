"""The configuration of a training run; recipes in ``config/training/*.yaml`` spell it out."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stream3r_core.config import ModelConfig, from_dict, option
from stream3r_core.errors import ConfigError, DataError
from stream3r_core.synthetic import CALM, DRONE, HAND_HELD, WHEELED
from stream3r_core.synthetic.worlds import KINDS
from stream3r_core.training.dense_loss import DenseLossConfig

MOTIONS = {'hand_held': HAND_HELD, 'calm': CALM, 'wheeled': WHEELED, 'drone': DRONE}


def require(name: str, good: bool, got: object, expected: str) -> None:
    """Refuse an option of a recipe that is not as expected."""
    if not good:
        raise ConfigError(f'{name}: expected {expected}, got {got!r}')


def _is_range(pair: tuple[float, ...], low: float, high: float) -> bool:
    return len(pair) == 2 and low < pair[0] <= pair[1] < high


@dataclass(frozen=True)
class StageConfig:
    """One part of the curriculum: which synthetic clips, how many."""

    steps: int = option(1000, 'steps of this stage', minimum=1)
    batch: int = option(16, 'clips of a batch, on each process', minimum=1)
    frames: tuple[int, ...] = option(
        (3,), 'clip lengths; one is drawn per step, the batch shrinks with it'
    )
    size_hw: tuple[int, ...] = option((48, 64), 'image height and width, pixels')
    fps: tuple[float, ...] = option(
        (4.0, 4.0), 'frame rate between these two, even in its logarithm; lower means more motion'
    )
    longest_s: float = option(
        0.0, 'raises the frame rate of clips that would last longer; 0 = never', minimum=0.0
    )
    room_half_m: tuple[float, ...] = option(
        (1.5, 3.5), 'half the room width between these two, metres'
    )
    fov_deg: tuple[float, ...] = option((50.0, 85.0), 'horizontal field of view between these two')
    principal_shift: float = option(
        0.0,
        'largest shift of the principal point, as a share of the image sides',
        minimum=0.0,
        maximum=0.5,
    )
    moving: float = option(0.0, 'share of furniture that moves', minimum=0.0, maximum=1.0)
    shadows: bool = option(False, 'cast shadows')
    motions: tuple[str, ...] = option(
        ('hand_held',),
        'ways to carry the camera; one is drawn per step, the first is validated',
    )
    worlds: tuple[str, ...] = option(('room',), 'kinds of worlds; one is drawn per step')
    windows: tuple[int, ...] = option(
        (0,),
        'attention windows; 0 = causal, -1 = all frames; one is drawn per step, the first is '
        'validated',
    )
    dense_share: float = option(
        1.0,
        'share of the frames of a clip, at least two, whose depth and points are made and judged; '
        'neighbours teach much the same, and two dense heads cost more than all else of tiny',
        minimum=0.0,
        maximum=1.0,
    )
    keep: tuple[float, ...] = option(
        (1.0,), 'share of the tokens of past frames that stay visible; one is drawn per step'
    )

    def __post_init__(self):
        for name in ('frames', 'windows', 'keep', 'motions', 'worlds'):
            require(name, len(getattr(self, name)) > 0, (), 'at least one value')
        require('frames', min(self.frames) >= 1, self.frames, 'lengths of at least 1')
        sides = self.size_hw
        require('size_hw', len(sides) == 2 and min(sides) > 0, sides, 'height and width')
        require('fps', _is_range(self.fps, 0, math.inf), self.fps, 'lowest and highest above 0')
        require('fov_deg', _is_range(self.fov_deg, 0, 180), self.fov_deg, 'two within 0 to 180')
        room = self.room_half_m
        require('room_half_m', _is_range(room, 0, math.inf), room, 'smallest and largest above 0')
        require('windows', min(self.windows) >= -1, self.windows, '-1, 0 or numbers of frames')
        shares = all(0 <= share <= 1 for share in self.keep)
        require('keep', shares, self.keep, 'shares from 0 to 1')
        for name, known in (('motions', MOTIONS), ('worlds', KINDS)):
            values = getattr(self, name)
            require(name, set(values) <= set(known), values, f'some of {", ".join(known)}')


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and schedule."""

    name: str = option('adamw', 'optimiser', choices=('adamw', 'muon'))
    lr: float = option(6e-4, 'peak learning rate', minimum=0.0)
    pose_factor: float = option(
        1.0,
        'learning rate of the last layers of the camera head, as a share: their answer is nine '
        'numbers, which a step of all weights shakes',
        minimum=0.0,
    )
    rest_factor: float = option(
        1.0, 'the same for everything else outside the matrices of the transformer', minimum=0.0
    )
    min_lr: float = option(1e-6, 'learning rate at the end', minimum=0.0)
    warmup_steps: int = option(100, 'steps of linear warm-up', minimum=0)
    weight_decay: float = option(0.05, 'weight decay of matrices', minimum=0.0)
    clip_norm: float = option(1.0, 'largest norm of the gradient', minimum=0.0)
    accumulate: int = option(1, 'batches per step', minimum=1)
    ema_decay: float = option(0.999, 'decay of the averaged weights', minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class FolderConfig:
    """A folder of scenes in CUT3R layout."""

    path: str = option('', 'the folder')
    weight: float = option(1.0, 'share of batches drawn from it', minimum=0.0)
    max_interval: int = option(20, 'largest step between two views', minimum=1)
    video_prob: float = option(
        0.6, 'probability of views in temporal order', minimum=0.0, maximum=1.0
    )
    fix_interval_prob: float = option(
        0.6, 'of those, with a constant step', minimum=0.0, maximum=1.0
    )
    aug_crop: int = option(
        0,
        'images are scaled to 0 up to this many pixels more, exclusive, and cut; published: 16',
        minimum=0,
    )
    jitter: tuple[float, ...] = option(
        (0.0, 0.0, 0.0, 0.0),
        'random brightness, contrast, saturation and hue; published: 0.5, 0.5, 0.5, 0.1',
    )
    jitter_per_view: bool = option(
        True, 'colours of each view by itself (STream3R), or of a clip at once (StreamVGGT)'
    )


@dataclass(frozen=True)
class TaughtHead:
    """One attention head of a global block that is shown where its patches were seen before."""

    layer: int = option(1, 'global block', minimum=0)
    head: int = option(0, 'head of it', minimum=0)
    frames: str = option(
        'each',
        'each: earlier frames, one by one, whatever it attends to them; '
        'anchor: the first frame, and nothing else; earlier: all earlier frames alike',
        choices=('each', 'anchor', 'earlier'),
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run needs; written into its checkpoints."""

    preset: str = option('tiny', 'network preset')
    model: ModelConfig | None = None  # sizes instead of those of the preset
    init: str = option(
        '',
        "starting weights: file, folder, Hugging Face id, or 'shipped'; '' = from nothing",
    )
    loss: str = option('dense', 'objective', choices=('dense', 'stream3r', 'distill', 'points'))
    teacher: str = option('', 'weights of the teacher of the distillation')
    freeze: tuple[str, ...] = option((), 'prefixes of parameters that keep their values')
    seed: int = option(0, 'seed of everything')
    precision: str = option(
        'auto',
        'autocast; auto: bfloat16, but on processors that do not multiply it',
        choices=('auto', 'no', 'bf16'),
    )
    taught: tuple[TaughtHead, ...] = ()  # attention heads that are taught to match, loss dense
    match_weight: float = option(0.2, 'weight of that teaching: cross-entropy', minimum=0.0)
    match_position_weight: float = option(
        0.0, 'likewise: distance of where a head looks from the match, in patches', minimum=0.0
    )
    fit_pose_step: int = option(0, 'when to fit the last layer of the camera head', minimum=0)
    fit_pose_batches: int = option(0, 'batches to fit it to; 0 = never', minimum=0)
    checkpoint_blocks: bool = option(
        False, 'recompute the blocks in the backward pass to save memory'
    )
    compile_renderer: bool = option(False, 'compile the renderer; needs a C++ compiler on a CPU')
    save_every: int = option(500, 'steps between checkpoints', minimum=1)
    validate_every: int = option(500, 'steps between validations', minimum=1)
    validation_scenes: int = option(20, 'held-out sequences', minimum=1)
    validation_frames: int = option(30, 'frames of each', minimum=2)
    stages: tuple[StageConfig, ...] = field(default_factory=lambda: (StageConfig(),))
    synthetic_weight: float = option(
        1.0, 'share of batches drawn from synthetic rooms', minimum=0.0
    )
    folders: tuple[FolderConfig, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dense: DenseLossConfig = field(default_factory=DenseLossConfig)

    def __post_init__(self):
        require('stages', len(self.stages) > 0, self.stages, 'at least one')
        dense = self.loss == 'dense'
        require('taught', dense or not self.taught, self.taught, 'none, or loss dense')
        for name, shares in (
            ('keep', [share for stage in self.stages for share in stage.keep]),
            ('dense_share', [stage.dense_share for stage in self.stages]),
        ):
            require(name, dense or min(shares) == 1, shares, '1.0, or loss dense')
        if self.init == 'shipped' and self.model is not None:
            raise ConfigError("init 'shipped' is for a preset; leave out the sizes under model")

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> StageConfig:
        """Stage of ``step``; beyond the end the last one goes on."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def load_recipe(path: str | Path) -> TrainingConfig:
    """Read a YAML recipe."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f'training recipe {path} does not exist; see config/training/ for examples'
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f'{path} is no YAML: {error}') from error
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: expected a mapping of training options, got {values!r:.80}')
    return from_dict(TrainingConfig, values)
