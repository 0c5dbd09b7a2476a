"""From image to map: the path that node, replay and demo share."""

import numpy as np
import pytest
import torch
from golden_data import golden_network

from stream3r_core.config import (
    CoreConfig,
    ImageConfig,
    MappingConfig,
    SessionConfig,
    WeightsConfig,
)
from stream3r_core.errors import ConfigError, InputError
from stream3r_core.pipeline import (
    Reconstructor,
    load_configured_model,
    reconstruct_photos,
    resolve_device,
    resolve_dtype,
)

KEEP_ALL = MappingConfig(min_confidence=1.0, confidence_quantile=0.0, edge_ratio=0.0)


def camera_images(count, height=60, width=100, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def reconstructor(**mapping):
    config = CoreConfig(
        session=SessionConfig(mode='window', window=2),
        mapping=MappingConfig(**{**vars(KEEP_ALL), **mapping}),
    )
    return Reconstructor(golden_network('stream3r'), config)


def test_prediction_fields_have_their_stated_shapes_types_and_values():
    pipeline = reconstructor(source='points')
    for i, image in enumerate(camera_images(3)):
        prediction = pipeline.process(image, stamp_ns=1_700_000_000_123_456_789 + i)
    assert (prediction.index, prediction.stamp_ns) == (2, 1_700_000_000_123_456_791)
    height, width = prediction.depth.shape
    assert (height, width) == (42, 70)
    assert prediction.T_world_camera.shape == (4, 4) and prediction.K.shape == (3, 3)
    rotation = prediction.T_world_camera[:3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-5, rtol=0)
    assert prediction.rgb.shape == (height, width, 3) and prediction.rgb.dtype == torch.uint8
    assert prediction.world_points.shape == (height, width, 3)
    for conf in (prediction.depth_conf, prediction.world_points_conf):
        assert conf.shape == (height, width) and (conf >= 1).all()
    assert (prediction.depth > 0).all()


def test_at_camera_resolution_every_map_has_the_cameras_size_and_the_same_rays():
    prediction = reconstructor(source='points').process(camera_images(1)[0])
    full = prediction.at_camera_resolution()
    assert full.depth.shape == full.depth_conf.shape == (60, 100)
    assert full.world_points.shape == full.rgb.shape == (60, 100, 3)
    point = torch.tensor([0.3, -0.2, 2.0])
    small, large = ((K @ point)[:2] / 2.0 for K in (prediction.K, full.K))
    scale = torch.tensor([70 / 100, 42 / 60])
    torch.testing.assert_close(small + 0.5, (large + 0.5) * scale, atol=1e-4, rtol=0)


def test_known_intrinsics_replace_the_predicted_field_of_view():
    K = np.array([[80.0, 0, 49.5], [0, 80.0, 29.5], [0, 0, 1]])
    image = camera_images(1)[0]
    free, known = (reconstructor().process(image, K=k) for k in (None, K))
    assert not torch.allclose(free.K, known.K)
    torch.testing.assert_close(known.at_camera_resolution().K, torch.tensor(K).float())
    assert torch.equal(free.depth, known.depth)


def test_the_point_head_runs_only_when_the_map_reads_it():
    assert reconstructor(source='depth').process(camera_images(1)[0]).world_points is None


@pytest.mark.parametrize('bad', [np.zeros((0, 5, 3), np.uint8), np.full((9, 9, 3), np.nan)])
def test_a_bad_image_changes_neither_session_nor_map(bad):
    images = camera_images(3)
    clean, disturbed = reconstructor(), reconstructor()
    for image in images[:2]:
        clean.process(image)
        disturbed.process(image)
    before = disturbed.map.version
    with pytest.raises(InputError):
        disturbed.process(bad)
    assert disturbed.map.version == before
    assert torch.equal(clean.process(images[2]).depth, disturbed.process(images[2]).depth)


def test_reset_clears_the_map_unless_it_is_to_be_kept():
    pipeline = reconstructor()
    pipeline.process(camera_images(1)[0])
    points = pipeline.map.num_points
    pipeline.reset(keep_map=True)
    assert pipeline.map.num_points == points > 0
    assert pipeline.process(camera_images(1)[0]).index == 0
    pipeline.reset()
    assert pipeline.map.num_points == 0


def test_a_restart_goes_on_from_a_pose_in_the_same_map():
    pipeline = reconstructor(source='points')
    images = camera_images(2)
    first = pipeline.process(images[0])
    points = pipeline.map.num_points
    T = torch.tensor([[0.0, -1, 0, 3], [1, 0, 0, -2], [0, 0, 1, 50], [0, 0, 0, 1]])
    pipeline.restart_at(T)
    again = pipeline.process(images[0])
    torch.testing.assert_close(again.T_world_camera, T @ first.T_world_camera)
    moved = first.world_points @ T[:3, :3].T + T[:3, 3]
    torch.testing.assert_close(again.world_points, moved)
    assert pipeline.map.num_points == 2 * points  # the same points once more, far away
    pipeline.reset()
    assert torch.equal(pipeline.process(images[0]).T_world_camera, first.T_world_camera)


def test_photos_of_different_sizes_are_seen_all_at_once_and_padding_stays_out_of_the_map():
    photos = [*camera_images(2), camera_images(1, height=80, width=80)[0]]
    config = CoreConfig(image=ImageConfig(fit='pad'), mapping=KEEP_ALL)
    network = golden_network('stream3r')
    predictions = list(reconstruct_photos(network, photos, config))
    assert [p.index for p in predictions] == [0, 1, 2]
    assert {tuple(p.depth.shape) for p in predictions} == {(70, 70)}
    swapped = list(reconstruct_photos(network, photos[:1] + photos[:0:-1], config))
    torch.testing.assert_close(swapped[2].depth, predictions[1].depth, atol=1e-4, rtol=1e-4)
    pipeline = Reconstructor(network, config)
    pipeline.map.integrate(predictions[0])
    colours = pipeline.map.points().colors_rgb
    assert len(colours) and not (colours == 255).all(1).any()


def test_configured_model_has_the_asked_device_and_dtype():
    config = WeightsConfig(preset='tiny', weights='random', device='cpu', dtype='bfloat16')
    assert load_configured_model(config).dtype == torch.bfloat16


@pytest.mark.parametrize(('asked', 'given'), [(1, 1), (3, 3), (0, 2)])
def test_the_network_takes_as_many_threads_as_it_may(asked, given):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_configured_model(WeightsConfig(weights='random', device='cpu', cpu_threads=asked))
        assert torch.get_num_threads() == given
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="use 'auto', 'cpu' or 'cuda'"):
        resolve_device('gpu')


def test_a_gpu_beyond_those_there_are_is_refused_with_their_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert resolve_device('cuda:1').index == 1 and resolve_device('cuda').type == 'cuda'
    with pytest.raises(ConfigError, match="there are 2 CUDA devices; the last one is 'cuda:1'"):
        resolve_device('cuda:9')


@pytest.mark.parametrize('has, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_where_the_processor_multiplies_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has)
    assert resolve_dtype('auto', torch.device('cpu')) == dtype
    assert load_configured_model(WeightsConfig(weights='random')).dtype == dtype
    exact = load_configured_model(WeightsConfig(weights='random', dtype='float32'))
    assert exact.dtype == torch.float32
