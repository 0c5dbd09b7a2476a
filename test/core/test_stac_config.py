"""The two profiles: names, numbers, files."""

import dataclasses
from pathlib import Path

import yaml

from stream3r_core.config import CacheConfig, CoreConfig, PublishedCacheConfig, flatten, from_dict

CONFIG = Path(__file__).resolve().parents[2] / 'config'


def options(name):
    (node,) = yaml.safe_load((CONFIG / f'{name}.yaml').read_text()).values()
    return from_dict(CoreConfig, node['ros__parameters'])


def test_the_published_profile_has_the_published_numbers():
    c = PublishedCacheConfig()
    assert (c.window, c.chunk_size, c.heavy_hitters, c.retrieved) == (4, 4, 2, 2)
    assert (c.pinned_frames, c.score_decay, c.voxel_size) == ((0,), 0.9, 0.05)
    assert (c.buffer_size, c.num_pivots, c.absorb_threshold, c.drop_gate) == (8, 4, 0.8, 0.2)
    assert c.min_confidence == 2.0


def test_every_repair_of_the_default_profile_is_off_in_the_published_one():
    repairs = {'bounded', 'query_retrieval', 'sound_merging', 'guard_points', 'skip_still'}
    for name in repairs:
        assert getattr(CacheConfig(), name) and not getattr(PublishedCacheConfig(), name)
    assert CacheConfig().voxel_size == 0 < PublishedCacheConfig().voxel_size
    assert (CacheConfig().camera_memory, PublishedCacheConfig().camera_memory) == (
        'anchors', 'window',
    )  # fmt: skip


def test_the_shipped_files_name_the_profiles():
    stac, paper = options('stac'), options('stac_paper')
    assert stac.session.mode == 'stac' and stac.cache == CacheConfig()
    assert paper.session.mode == 'stac_paper'
    assert paper.cache_paper == PublishedCacheConfig()


def test_an_override_of_one_published_option_keeps_the_others():
    config = from_dict(CoreConfig, {'cache_paper': {'chunk_size': 1}})
    assert config.cache_paper == dataclasses.replace(PublishedCacheConfig(), chunk_size=1)
    assert config.cache == CacheConfig()


def test_options_of_both_profiles_have_names_and_help():
    leaves = flatten(CoreConfig())
    assert leaves['cache.max_bytes'] == 0 and leaves['cache_paper.voxel_size'] == 0.05
    for profile in (CacheConfig, PublishedCacheConfig):
        assert all(f.metadata.get('help') for f in dataclasses.fields(profile))
