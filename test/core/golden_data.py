"""Access to the golden tensors of the small networks (see test/golden/README.md)."""

import gzip
import json
from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file

from stream3r_core.config import ModelConfig
from stream3r_core.model.network import CausalVGGT

FOLDER = Path(__file__).resolve().parents[1] / 'golden'
MODELS = ('stream3r', 'streamvggt')
SIZES = ('landscape_42x70', 'portrait_56x42')
MAPS = ('depth', 'depth_conf', 'world_points', 'world_points_conf')

# Streams whose dense maps equal those of a batch group to rounding, stored once.
SAME_MAPS = {'stream_causal': 'causal', 'stream_window2': 'window3', 'stream': 'causal'}


def golden_config(model):
    return ModelConfig.from_dict(
        json.loads((FOLDER / f'{model}_small.json').read_text())['config']
    )


def weights_file(model):
    return FOLDER / f'{model}_small.weights.safetensors'


@lru_cache
def golden_network(model):
    """The network with golden weights; shared by tests, which must not change it."""
    network = CausalVGGT(golden_config(model)).eval().requires_grad_(False)
    network.load_state_dict(load_file(weights_file(model)))
    return network


@lru_cache
def images(size):
    """[1, 6, 3, H, W] in [0, 1]."""
    return load_file(FOLDER / 'images_small.safetensors')[size]


@lru_cache
def golden(model, size, part):
    """Golden tensors by name; part is 'batch', 'stream' or 'debug'."""
    tensors = load_file(FOLDER / f'{model}_small.{size}.{part}.safetensors')
    if part == 'stream':
        batch = golden(model, size, 'batch')
        for stream, group in SAME_MAPS.items():
            if f'{stream}.pose_enc' in tensors:
                tensors.update({f'{stream}.{name}': batch[f'{group}.{name}'] for name in MAPS})
    return tensors


def group(tensors, prefix):
    """The tensors of one group, without its prefix."""
    start = prefix + '.'
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def checkpoint_shapes(model):
    """Names and shapes of the published checkpoint."""
    lines = gzip.decompress((FOLDER / f'keys_{model}.txt.gz').read_bytes()).decode().splitlines()
    return {name: tuple(json.loads(shape)) for name, shape in (line.split('\t') for line in lines)}
