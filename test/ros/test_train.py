import pytest
import yaml

from stream3r_core.errors import DataError
from stream3r_core.training.settings import load_recipe
from stream3r_ros.cli import main
from stream3r_ros.train import find_recipe


@pytest.mark.parametrize(
    'name', ['tiny_synthetic', 'finetune_stream3r', 'finetune_vggt', 'distill_streamvggt']
)
def test_shipped_recipes_are_found_by_name_and_hold_known_options(name):
    assert load_recipe(find_recipe(name)).stages


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(DataError, match=r'tiny_synthetic\.yaml'):
        find_recipe('tiny_sintetic')


def test_a_run_is_left_and_goes_on(tmp_path, capsys):
    recipe = tmp_path / 'recipe.yaml'
    stage = {'steps': 3, 'batch': 1, 'frames': [2], 'size_hw': [16, 24]}
    sizes = {'img_size': 24, 'patch_size': 8, 'embed_dim': 16, 'num_heads': 1, 'encoder': 'conv'}
    sizes |= {'depth': 1, 'camera_heads': 1, 'dpt_layers': [0, 0, 0, 0], 'dpt_features': 8}
    sizes |= {'camera_trunk_depth': 1, 'dpt_out_channels': [8, 8, 8, 8]}
    options = {'stages': [stage], 'model': sizes, 'precision': 'no', 'validate_every': 100}
    recipe.write_text(yaml.safe_dump(options))
    command = ['train', str(recipe), '--output', str(tmp_path / 'run'), '--device', 'cpu']
    assert main([*command, '--stop-at', '1']) == 0
    assert main(command) == 0
    assert 'training from step 1 (resumed)' in capsys.readouterr().out
    assert main(['train', str(tmp_path / 'none.yaml'), '--output', str(tmp_path)]) == 1
    assert 'none.yaml' in capsys.readouterr().err
