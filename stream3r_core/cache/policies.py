"""Which caches a session mode means."""

import dataclasses

from stream3r_core.cache.base import KVCache
from stream3r_core.cache.camera import CameraCache
from stream3r_core.cache.dense import DenseCache
from stream3r_core.cache.offload import OffloadedCache
from stream3r_core.cache.shared import SharedIterationsCache
from stream3r_core.cache.stac import StacCache
from stream3r_core.cache.window import WindowCache
from stream3r_core.config import CacheConfig, PublishedCacheConfig, SessionConfig, from_dict
from stream3r_core.errors import ConfigError

KV_BITS = {'model': 0, 'int8': 8, 'int4': 4}
SPATIAL_MODES = {'stac': CacheConfig, 'stac_paper': PublishedCacheConfig}


def resolve_cache_config(mode: str, cache: CacheConfig | None) -> CacheConfig | None:
    """Return the checked configuration of the spatial memory, None for modes without one."""
    if mode not in SPATIAL_MODES:
        return None
    cache = cache or SPATIAL_MODES[mode]()
    if not isinstance(cache, SPATIAL_MODES[mode]):
        raise ConfigError(
            f'mode {mode!r} takes a {SPATIAL_MODES[mode].__name__}, got {type(cache).__name__}'
        )
    cache = from_dict(type(cache), dataclasses.asdict(cache), cache.tree)
    _refuse_contradictions(cache)
    return cache


def _refuse_contradictions(cache: CacheConfig) -> None:
    tree, pinned = cache.tree, cache.pinned_frames
    if cache.retrieved < 0 and not (cache.bounded and cache.query_retrieval):
        raise ConfigError(
            f'{tree}.retrieved=-1 attends to the whole pool, which needs a bound and leaves '
            'nothing to retrieve: with bounded=false or query_retrieval=false give a number of '
            'frames'
        )
    if cache.camera_memory == 'all' and cache.bounded:
        raise ConfigError(
            f"{tree}.camera_memory='all' keeps every frame for the camera head and so breaks any "
            "budget: use 'anchors' or 'window', or bounded=false"
        )
    if len(set(pinned)) < len(pinned) or any(frame < 0 for frame in pinned):
        raise ConfigError(
            f'{tree}.pinned_frames: expected different frame numbers from 0 on, got {pinned}'
        )


def make_caches(
    model, session: SessionConfig, cache: CacheConfig | None
) -> tuple[KVCache, KVCache]:
    """Return the aggregator's and the camera head's cache for a network and a mode."""
    sizes = model.config
    bits = _kv_bits(session, cache, sizes.head_dim)
    iterations, trunk = sizes.camera_iterations, sizes.camera_trunk_depth
    shared = session.camera_cache == 'shared'
    layers, updates = (trunk, iterations) if shared else (iterations * trunk, 1)
    if cache is None:
        offloads = session.mode == 'causal' and session.device_frames
        aggregator = (
            OffloadedCache(sizes.depth, session.device_frames, session.max_frames)
            if offloads
            else _whole_frames(session, sizes.depth, bits=bits)
        )
        camera = _whole_frames(session, layers, updates)
    else:
        camera = _camera_cache(model, cache, layers, updates)
        aggregator = StacCache(
            sizes.depth, sizes.num_heads, sizes.head_dim, sizes.num_special_tokens, cache,
            camera.capacity_bytes,
        )  # fmt: skip
    return aggregator, SharedIterationsCache(camera, trunk) if shared else camera


def _kv_bits(session: SessionConfig, cache: CacheConfig | None, head_dim: int) -> int:
    bits = KV_BITS[session.kv_dtype]
    if bits and (cache is not None or session.device_frames):
        raise ConfigError(
            f'session.kv_dtype={session.kv_dtype} serves the modes causal and window on one '
            "device: use 'model' with the spatial modes and with session.device_frames"
        )
    if bits and head_dim % 8:
        raise ConfigError(
            f'session.kv_dtype={session.kv_dtype} needs heads of a multiple of 8 channels, this '
            f"network has {head_dim}; use 'model'"
        )
    return bits


def _whole_frames(
    session: SessionConfig, num_layers: int, updates_per_frame: int = 1, bits: int = 0
) -> KVCache:
    if session.mode == 'causal':
        return DenseCache(num_layers, session.max_frames, updates_per_frame, bits)
    past_frames = session.window - (session.window_rule == 'exact')
    return WindowCache(num_layers, past_frames, updates_per_frame, bits)


def _camera_cache(model, cache: CacheConfig, layers: int, updates_per_frame: int) -> CameraCache:
    heads = model.config.camera_heads
    return CameraCache(
        layers,
        heads,
        2 * model.config.embed_dim // heads,
        window=None if cache.camera_memory == 'all' else cache.camera_window,
        pinned_frames=cache.pinned_frames,
        num_anchors=cache.camera_anchors if cache.camera_memory == 'anchors' else 0,
        chunk_size=cache.chunk_size,
        updates_per_frame=updates_per_frame,
        device=model.device,
    )
