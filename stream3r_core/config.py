"""One configuration tree: frozen dataclasses whose dotted names serve Python, YAML and ROS.

Every leaf carries its default, and its meaning in ``field(metadata={'help': ...})`` so that ROS
parameter descriptors and documentation are made from the same text.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from stream3r_core.backend.config import BackendConfig
from stream3r_core.errors import ConfigError
from stream3r_core.options import option

T = TypeVar('T')


@dataclass(frozen=True)
class TrackConfig:
    """Sizes of the point-track head (StreamVGGT and VGGT checkpoints only)."""

    features: int = 128
    corr_levels: int = 7
    corr_radius: int = 4
    hidden_size: int = 384
    depth: int = 6
    num_heads: int = 8
    num_virtual_tracks: int = 64
    stride: int = 2
    iters: int = 4
    max_scale: int = 518

    def __post_init__(self):
        if self.features % 4 or self.hidden_size % self.num_heads:
            raise ConfigError(
                f'track.features {self.features} must be a multiple of 4 and track.hidden_size '
                f'{self.hidden_size} one of track.num_heads {self.num_heads}'
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; the defaults are those of the published STream3R checkpoint."""

    img_size: int = 518  # side of the stored positional grid, pixels
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24  # frame blocks, and as many global blocks
    num_heads: int = 16
    num_register_tokens: int = 4
    rope_freq: float = 100
    mlp_ratio: float = 4
    encoder: str = 'dinov2'  # or 'conv', the small convolutional stem of the tiny preset
    dino_depth: int = 24
    dino_heads: int = 16
    camera_trunk_depth: int = 4
    camera_heads: int = 16
    camera_iterations: int = 4
    dpt_features: int = 256
    dpt_out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    dpt_layers: tuple[int, ...] = (4, 11, 17, 23)
    dpt_head_features_2: int = 32
    track: TrackConfig | None = None

    def __post_init__(self):
        if self.embed_dim % self.num_heads or self.embed_dim // self.num_heads % 4:
            raise ConfigError(
                f'embed_dim {self.embed_dim} with num_heads {self.num_heads}: the head width must '
                'be a whole multiple of 4 (2-D rotary positions); change one of them'
            )
        if 2 * self.embed_dim % self.camera_heads:
            raise ConfigError(
                f'camera_heads {self.camera_heads} does not divide the width {2 * self.embed_dim}'
            )
        if any(c % 4 for c in self.dpt_out_channels) or self.dpt_features % 8:
            raise ConfigError(
                f'dpt_out_channels {self.dpt_out_channels} must be multiples of 4, dpt_features '
                f'{self.dpt_features} of 8 (positional maps)'
            )
        if self.encoder == 'dinov2' and self.embed_dim % self.dino_heads:
            raise ConfigError(
                f'dino_heads {self.dino_heads} must divide embed_dim {self.embed_dim}'
            )
        if len(self.dpt_layers) != 4 or len(self.dpt_out_channels) != 4:
            raise ConfigError('dpt_layers and dpt_out_channels need exactly 4 entries each')
        if not all(0 <= tap < self.depth for tap in self.dpt_layers):
            raise ConfigError(f'dpt_layers {self.dpt_layers} must lie in 0..{self.depth - 1}')
        if self.encoder not in ('dinov2', 'conv'):
            raise ConfigError(f"encoder must be 'dinov2' or 'conv', got {self.encoder!r}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head of the aggregator."""
        return self.embed_dim // self.num_heads

    @property
    def num_special_tokens(self) -> int:
        """Camera and register tokens in front of the patch tokens of each frame."""
        return 1 + self.num_register_tokens

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one frame of ``height`` x ``width`` pixels (multiples of the patch size)."""
        return self.num_special_tokens + (height // self.patch_size) * (width // self.patch_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'ModelConfig':
        """Build from the names above; a ``track`` mapping means a track head."""
        return from_dict(cls, values)


PRESETS: dict[str, ModelConfig] = {
    'stream3r': ModelConfig(),
    'streamvggt': ModelConfig(track=TrackConfig()),
    'tiny': ModelConfig(
        img_size=64,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=3,
        num_register_tokens=1,
        encoder='conv',
        camera_trunk_depth=2,
        camera_heads=6,
        camera_iterations=1,
        dpt_features=24,
        dpt_out_channels=(24, 32, 48, 64),
        dpt_layers=(0, 1, 2, 3),
        dpt_head_features_2=16,
    ),
}


def model_config(preset_or_config: 'str | ModelConfig | Mapping[str, Any]') -> ModelConfig:
    """Resolve a preset name, a mapping or a ready configuration."""
    if isinstance(preset_or_config, ModelConfig):
        return preset_or_config
    if isinstance(preset_or_config, Mapping):
        return ModelConfig.from_dict(preset_or_config)
    if preset_or_config not in PRESETS:
        raise ConfigError(
            f'unknown preset {preset_or_config!r}; known: {", ".join(sorted(PRESETS))}'
        )
    return PRESETS[preset_or_config]


@dataclass(frozen=True)
class WeightsConfig:
    """Which network, which weights, where they run."""

    preset: str = option('tiny', 'network preset', choices=('tiny', 'stream3r', 'streamvggt'))
    weights: str = option(
        '', "Hugging Face id, folder or file; '' = shipped with the preset; 'random' = untrained"
    )
    revision: str = option('', 'revision on the Hugging Face hub; empty = main')
    device: str = option('auto', "torch device: 'auto', 'cpu', 'cuda', 'cuda:1'")
    dtype: str = option(
        'auto',
        'precision of the transformer; auto: bfloat16 on GPUs and on processors that multiply it '
        '(float16 on GPUs before Ampere), else float32',
        choices=('auto', 'float32', 'bfloat16', 'float16'),
    )
    weight_dtype: str = option(
        'model',
        "how weights are kept: 'model' = as multiplied; 'int8' = half the memory of bfloat16, "
        'widened in every product, at a small cost in accuracy',
        choices=('model', 'int8'),
    )
    compile: bool = option(
        False,
        'compile the parts whose shapes never change: takes a minute at the first image; '
        'what cannot be compiled runs as it is',
    )
    cpu_threads: int = option(
        0,
        'threads of the network on a CPU, of the whole process; fewer leave cores to others; '
        '0 = one for each core',
        minimum=0,
    )
    max_gpu_memory: float = option(
        0.0,
        'fraction of the GPU memory that this process may take, for GPUs shared with others; '
        '0 = no limit',
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class ImageConfig:
    """How a camera image is brought onto the patch grid."""

    long_side: int = option(
        0, 'longer side of the network image in pixels; 0 = the preset size', minimum=0
    )
    fit: str = option(
        'crop',
        "published loaders: 'crop', 'pad', and 'eval' of the evaluations",
        choices=('crop', 'pad', 'eval'),
    )


@dataclass(frozen=True)
class SessionConfig:
    """How the stream is attended to."""

    mode: str = option(
        'window',
        'attention over the past',
        choices=('causal', 'window', 'full', 'stac', 'stac_paper'),
    )
    window: int = option(5, 'recent frames kept beside the anchor frame (mode window)', minimum=1)
    window_rule: str = option(
        'published',
        "'published': anchor + K past frames + the current; 'exact': K counts the current one",
        choices=('published', 'exact'),
    )
    camera_cache: str = option(
        'per_iteration',
        "'per_iteration': equals the batch pass; 'shared': the published StreamVGGT streaming",
        choices=('per_iteration', 'shared'),
    )
    max_frames: int = option(
        0, 'mode causal: refuse to grow beyond this many frames; 0 = until memory ends', minimum=0
    )
    device_frames: int = option(
        0,
        'mode causal: frames kept on the device, all later ones wait in host memory; 0 = all',
        minimum=0,
    )
    kv_dtype: str = option(
        'model',
        "keys and values of the modes causal and window: 'model' = as multiplied, 'int8' = 1.9 "
        "times fewer bytes than bfloat16, 'int4' = 3.6 times fewer, at a cost in accuracy",
        choices=('model', 'int8', 'int4'),
    )


@dataclass(frozen=True)
class CacheConfig:
    """The bounded cache with a spatial memory (mode 'stac'); Greek letters are the paper's.

    Frame counts are tokens' worth: 2 frames of heavy hitters are twice the tokens of a frame, for
    each layer and head. :class:`PublishedCacheConfig` holds the published method (mode
    'stac_paper'); its switches are the ablations of this one.
    """

    tree: ClassVar[str] = 'cache'  # name of these options in the configuration tree

    max_bytes: int = option(
        0,
        'everything the cache may hold on the device; 0 = the keys and values of 23 frames',
        minimum=0,
    )
    bounded: bool = option(True, 'hold max_bytes; false: the spatial pool grows with the scene')
    window: int = option(4, 'recent frames kept whole', minimum=1)
    chunk_size: int = option(
        1, 'frames processed together, each seeing all others of its chunk', minimum=1, maximum=8
    )
    pinned_frames: tuple[int, ...] = option((0,), 'frames kept whole for ever')
    heavy_hitters: int = option(2, 'frames of the most attended older tokens', minimum=0)
    retrieved: int = option(
        2,
        'frames of tokens brought back from the pool for each step; -1: all of the pool is '
        'attended to where it is, which costs time and no copy',
        minimum=-1,
    )
    score: str = option(
        'attention',
        "what makes a heavy hitter: 'attention' received, or 'residual', the size of the update "
        'that its feed-forward layer made (cheaper)',
        choices=('attention', 'residual'),
    )
    score_decay: float = option(0.9, 'gamma: score kept per chunk', minimum=0.0, maximum=1.0)
    query_fraction: float = option(
        1.0, 'fraction of the queries that measure attention', minimum=0.01, maximum=1.0
    )
    buffer_size: int = option(8, 'B: raw tokens that make a pivot', minimum=2, maximum=64)
    num_pivots: int = option(4, 'P: merged tokens per voxel, layer and head', minimum=2, maximum=8)
    absorb_threshold: float = option(
        0.8, 'lambda: cosine at which a pivot absorbs a token', minimum=-1.0, maximum=1.0
    )
    drop_gate: float = option(
        0.2, 'beta: tokens below this fraction of the mean score are dropped', minimum=0.0
    )
    sound_merging: bool = option(
        True, 'merged keys keep their mean norm, the weight of a merged token is capped'
    )
    max_log_count: float = option(
        3.0, 'cap of the log-count of a merged token (with sound_merging)', minimum=0.0
    )
    voxel_size: float = option(
        0.0, 'voxel edge in scene units; 0 = a fraction of the depth of the scene', minimum=0.0
    )
    voxel_fraction: float = option(
        0.0,
        'voxel edge as a fraction of the median depth of the first frames; 0 = a little more '
        'than a token sees at that depth',
        minimum=0.0,
        maximum=1.0,
    )
    guard_points: bool = option(
        True, 'tokens without a finite point of usual confidence stay out of the pool'
    )
    min_confidence: float = option(
        1.0, 'tau: points of lower confidence have no place', minimum=1.0
    )
    confidence_quantile: float = option(
        0.1, 'this fraction of a frame has no place (with guard_points)', minimum=0.0, maximum=0.99
    )
    query_retrieval: bool = option(
        True,
        'retrieve after eviction what the current queries ask for; false: before eviction, '
        'the most merged tokens',
    )
    camera_memory: str = option(
        'anchors',
        "past of the camera head: 'anchors' = recent and spaced frames, 'window' = pinned and "
        "recent frames, 'all' = every frame, without bound",
        choices=('anchors', 'window', 'all'),
    )
    camera_window: int = option(8, 'recent frames that the camera head sees', minimum=1)
    camera_anchors: int = option(
        32, 'spaced frames that the camera head sees (camera_memory anchors)', minimum=2
    )
    skip_still: bool = option(
        True, 'frames without parallax are tracked but enter neither cache nor map'
    )
    still_change: float = option(
        0.006, 'mean change of a patch, of 1, up to which a view counts as unchanged', minimum=0.0
    )
    still_motion: float = option(
        0.004,
        'camera motion, as a fraction of depth plus radians, up to which a view with moving '
        'things in it counts as unchanged',
        minimum=0.0,
    )


@dataclass(frozen=True)
class PublishedCacheConfig(CacheConfig):
    """The published method, without the repairs that :class:`CacheConfig` makes."""

    tree: ClassVar[str] = 'cache_paper'

    bounded: bool = option(False, 'hold max_bytes; false: the spatial pool grows with the scene')
    chunk_size: int = option(4, 'frames processed together', minimum=1, maximum=8)
    sound_merging: bool = option(False, 'merged keys keep their mean norm, log-count is capped')
    voxel_size: float = option(0.05, 'voxel edge in scene units', minimum=0.0)
    guard_points: bool = option(False, 'tokens of unusually low confidence stay out of the pool')
    min_confidence: float = option(2.0, 'tau: points of lower confidence have no place')
    query_retrieval: bool = option(False, 'retrieve after eviction, by the current queries')
    camera_memory: str = option(
        'window', 'past of the camera head', choices=('anchors', 'window', 'all')
    )
    camera_window: int = option(4, 'recent frames that the camera head sees', minimum=1)
    skip_still: bool = option(False, 'frames without parallax enter neither cache nor map')


@dataclass(frozen=True)
class CarvingConfig:
    """Removal of points that later rays contradict: what moved away, and what was wrong."""

    enabled: bool = option(
        False,
        'remove points that later images look through, those of moved things say; with a back end '
        'in the newest submap',
        live=True,
    )
    max_voxels: int = option(
        30_000,
        'voxels examined per image, in turn: the cost does not grow with the map',
        minimum=1,
        live=True,
    )
    margin: float = option(
        0.1,
        'how far in front of what is seen a point must lie to be in the way, as a fraction of '
        'the depth; more than the error of depths',
        minimum=0.0,
        maximum=1.0,
        live=True,
    )
    margin_voxels: float = option(
        2.0, 'and by how many voxels more', minimum=0.0, maximum=1000.0, live=True
    )


@dataclass(frozen=True)
class MappingConfig:
    """The accumulated, voxel-hashed point map."""

    source: str = option(
        'depth',
        "'depth': depth unprojected with the pose; 'points': the point head",
        choices=('depth', 'points'),
    )
    voxel_size: float = option(
        0.0, 'voxel edge in map units; 0 = voxel_fraction of the first median depth', minimum=0.0
    )
    voxel_fraction: float = option(
        0.01,
        'voxel edge as a fraction of the median depth of the first frame',
        minimum=1e-5,
        maximum=1.0,
    )
    max_points: int = option(2_000_000, 'point budget of the map', minimum=1, maximum=100_000_000)
    min_confidence: float = option(
        1.1,
        'points below this confidence stay out of the map; its scale differs from network to '
        'network; 1 = no limit',
        minimum=1.0,
        live=True,
    )
    confidence_quantile: float = option(
        0.2,
        'the least confident fraction of each frame stays out of the map',
        minimum=0.0,
        maximum=0.99,
        live=True,
    )
    edge_ratio: float = option(
        0.05,
        'drop pixels whose depth jumps by more than this fraction to a neighbour; 0 = keep',
        minimum=0.0,
    )
    max_depth: float = option(
        0.0, 'drop points farther than this, map units; 0 = no limit', minimum=0.0
    )
    carving: CarvingConfig = field(default_factory=CarvingConfig)


@dataclass(frozen=True)
class OccupancyConfig:
    """A 2-D grid from a level map: obstacles, free floor, and what is not known.

    Heights are fractions of the camera's height above the floor, so that they hold whatever the
    unit of the map is.
    """

    resolution: float = option(
        0.0, 'edge of a cell in map units; 0 = three voxels of the map', minimum=0.0
    )
    camera_height: float = option(
        0.0,
        'height of the camera above the floor in map units; 0 = the floor is found in the map',
        minimum=0.0,
    )
    min_height: float = option(
        0.15,
        "obstacles begin here, as a fraction of the camera's height; what is lower is floor",
        minimum=0.0,
        maximum=10.0,
    )
    max_height: float = option(
        1.1,
        "obstacles end here, as a fraction of the camera's height; what is higher is passed under",
        minimum=0.0,
        maximum=100.0,
    )
    min_points: int = option(2, 'points that make a cell occupied', minimum=1)
    max_cells: int = option(
        1_000_000,
        'cells of the grid; of a larger map the surroundings of the camera are shown',
        minimum=100,
        maximum=100_000_000,
    )


@dataclass(frozen=True)
class RefinementConfig:
    """Poses refined by aligning images to each other (:mod:`stream3r_core.refinement`)."""

    kind: str = option(
        'auto',
        'direct: each image is aligned to a keyframe, with the depth of the network; none: poses '
        'are those of the network; auto: direct for the preset tiny, where it was measured to pay',
        choices=('auto', 'none', 'direct'),
    )
    min_overlap: float = option(
        0.85,
        'an image that shows less of the keyframe becomes the next one',
        minimum=0.0,
        maximum=1.0,
    )
    least_overlap: float = option(
        0.4,
        "with less of the keyframe in sight the pose is the network's",
        minimum=0.0,
        maximum=1.0,
    )
    least_explained: float = option(
        0.6,
        "where the image repeats less of the variation of the keyframe the pose is the network's",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class CoreConfig:
    """Everything the core reads: the root of the tree that node, replay and demo share."""

    model: WeightsConfig = field(default_factory=WeightsConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cache_paper: PublishedCacheConfig = field(default_factory=PublishedCacheConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    mapping: MappingConfig = field(default_factory=MappingConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = '') -> T:
    """Build the dataclass ``cls`` from nested mappings, refusing unknown keys and bad values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'{path or cls.__name__}: expected a mapping of options, got {values!r}')
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        where = f' in {path}' if path else ''
        raise ConfigError(f'unknown option {unknown[0]!r}{where}; known: {", ".join(fields)}')
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for name, value in values.items():
        dotted = f'{path}.{name}' if path else name
        kwargs[name] = _convert(hints[name], value, dotted)
        _check_limits(fields[name], kwargs[name], dotted)
    return cls(**kwargs)


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
        return _convert(hint, value, dotted)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, dotted)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, '__iter__'):
            raise ConfigError(f'{dotted}: expected a list, got {value!r}')
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, dotted) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f'{dotted}: expected {hint.__name__}, got {value!r}')
    return value


def _check_limits(f: dataclasses.Field, value: Any, dotted: str) -> None:
    choices, low, high = (f.metadata.get(k) for k in ('choices', 'minimum', 'maximum'))
    if choices is not None and value not in choices:
        raise ConfigError(
            f'{dotted}: expected one of {", ".join(map(str, choices))}, got {value!r}'
        )
    too_low = low is not None and not value >= low  # written so that NaN is refused
    too_high = high is not None and not value <= high
    if too_low or too_high:
        bounds = f'>= {low}' if high is None else f'in {low}..{high}'
        raise ConfigError(f'{dotted}: expected a value {bounds}, got {value!r}')


def to_dict(config: Any) -> dict[str, Any]:
    """Return the nested plain mapping of a configuration, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
    """Return dotted leaf names and values, the spelling of ROS parameters."""
    leaves = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves.update(flatten(value, f'{prefix}{f.name}.'))
        else:
            leaves[prefix + f.name] = value
    return leaves
