"""A GPU without room costs a session, never the map and never the node.

There is no GPU here: the network raises the very exceptions that are raised on one.
"""

import dataclasses

import pytest
import torch

from stream3r_core import load_model
from stream3r_core.config import CoreConfig, SessionConfig, WeightsConfig
from stream3r_core.gpu_memory import is_out_of_memory, limit_gpu_memory
from stream3r_core.pipeline import load_configured_model
from stream3r_core.slam import make_reconstructor

pytestmark = pytest.mark.ros
BACKEND = CoreConfig().backend

# A node whose network finds no memory when it sees its third and its fourth image.
WITHOUT_MEMORY = """
import sys, torch
from stream3r_core.model.network import CausalVGGT
from stream3r_ros.cli import main

seen = 0
stream = CausalVGGT.stream

def stream_or_fail(self, *args, **kwargs):
    global seen
    seen += 1
    result = stream(self, *args, **kwargs)
    if seen == 3:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nmore')
    if seen == 4:  # a library that asks the driver itself
        raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`')
    return result

CausalVGGT.stream = stream_or_fail
sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_resets_the_session_keeps_the_map_and_is_reported(live):
    live.entry = ('-c', WITHOUT_MEMORY)
    live.start(**{
        'session.mode': 'causal', 'on_failure': 'exit', 'outputs.path.max_rate_hz': 0,
        'mapping.min_confidence': 1.0, 'outputs.map.period_s': 0.1,
    })  # fmt: skip
    live.connect_camera()
    rejected = live.figure('images_dropped.rejected')
    live.feed(0, 1)
    live.wait_until(lambda: live.figure('images_processed') == 2)
    assert live.figure('map_points') > 0
    points, tokens = live.figure('map_points'), live.figure('cache_tokens')
    for failed in (1, 2):
        live.camera.publish(live.image(1 + failed))
        live.wait_until(lambda n=failed: live.figure('restarts.out_of_memory') == n)
        live.wait_until(lambda n=failed: live.figure('images_dropped.rejected') == rejected + n)
        assert live.figure('map_points') == points and live.figure('cache_tokens') == 0
    assert live.figure('state') == 'active'
    assert 'out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.)' in live.log
    assert 'out of GPU memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED' in live.log
    live.feed(4, 5)
    live.wait_until(lambda: live.figure('cache_tokens') == tokens)
    assert live.figure('map_points') >= points
    live.wait_for_path(0, 1, 4, 5)


@pytest.mark.parametrize('kind', ['none', 'submaps'])
def test_a_released_session_has_no_storage_starts_anew_and_leaves_the_map(kind):
    config = CoreConfig(
        session=SessionConfig(mode='causal'), backend=dataclasses.replace(BACKEND, kind=kind)
    )
    reconstructor = make_reconstructor(load_model('tiny'), config)
    picture = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
    (first,) = reconstructor.feed(picture, 1)
    assert reconstructor.session.cache.capacity_bytes > 0
    version, count = reconstructor.map.version, len(reconstructor.map.view())
    reconstructor.release_session()
    assert reconstructor.session.cache.capacity_bytes == 0
    assert (reconstructor.map.version, len(reconstructor.map.view())) == (version, count)
    (second,) = reconstructor.feed(picture, 2)
    assert torch.equal(second.depth_conf, first.depth_conf)


@pytest.mark.parametrize(
    ('error', 'is_one'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True),
        (
            RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be reported later'),
            True,
        ),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`'), True),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), True),
        (RuntimeError('CUDA error: an illegal memory access was encountered'), False),
        (ValueError('out of memory'), False),
    ],
)
def test_only_a_gpu_without_room_is_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_the_memory_limit_is_set_on_the_gpu_of_the_network(monkeypatch):
    limits = []
    monkeypatch.setattr(
        torch.cuda, 'set_per_process_memory_fraction', lambda *given: limits.append(given)
    )
    limit_gpu_memory(0.5, torch.device('cuda', 1))
    assert limits == [(0.5, 1)]


def test_a_memory_limit_without_a_gpu_is_said_to_have_no_effect(caplog):
    config = WeightsConfig(weights='random', device='cpu', max_gpu_memory=0.5)
    load_configured_model(config)
    assert 'model.max_gpu_memory has no effect: the network runs on cpu' in caplog.text
