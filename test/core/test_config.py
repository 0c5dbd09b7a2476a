import dataclasses

import pytest

from stream3r_core.config import CoreConfig, ModelConfig, flatten, from_dict, model_config, to_dict
from stream3r_core.errors import ConfigError


def test_round_trip_through_plain_dictionaries():
    config = CoreConfig()
    assert from_dict(CoreConfig, to_dict(config)) == config


def test_unknown_key_names_the_key_and_the_known_ones():
    with pytest.raises(ConfigError, match=r'windw. in session; known: mode'):
        from_dict(CoreConfig, {'session': {'windw': 3}})


@pytest.mark.parametrize(
    'values',
    [
        {'session': {'window': 0}},
        {'session': {'mode': 'causel'}},
        {'session': {'window': 2.5}},
        {'session': {'window': True}},
        {'session': 3},
        {'mapping': {'voxel_fraction': float('nan')}},
    ],
)
def test_wrong_type_or_range_is_refused(values):
    with pytest.raises(ConfigError):
        from_dict(CoreConfig, values)


def test_an_integer_serves_where_a_float_is_expected():
    assert from_dict(CoreConfig, {'mapping': {'voxel_size': 1}}).mapping.voxel_size == 1.0


def test_track_block_means_a_track_head():
    assert ModelConfig.from_dict({}).track is None
    assert ModelConfig.from_dict({'track': {'features': 16}}).track.features == 16


def test_every_leaf_has_a_help_text_and_a_dotted_name():
    def leaves(cls, prefix=''):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type):
                yield from leaves(f.type, f'{prefix}{f.name}.')
            else:
                yield prefix + f.name, f

    found = dict(leaves(CoreConfig))
    assert set(found) == set(flatten(CoreConfig()))
    assert all(f.metadata.get('help') for f in found.values())


def test_presets():
    assert model_config('stream3r').tokens_per_frame(392, 518) == 1041
    with pytest.raises(ConfigError, match='known: '):
        model_config('stream4r')


@pytest.mark.parametrize(
    'values',
    [
        {'embed_dim': 100},
        {'dpt_layers': [0, 1, 2]},
        {'dpt_layers': [0, 1, 2, 99]},
        {'encoder': 'x'},
    ],
)
def test_impossible_networks_are_refused(values):
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(values)
