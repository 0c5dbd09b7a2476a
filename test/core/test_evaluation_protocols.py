"""Published protocols: a network that answers with the truth gets the perfect score."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from dataset_miniatures import Scene, camera, distance_to_plane_m
from oracle import CONFIG, room_clip
from PIL import Image

from stream3r_core.config import ModelConfig, from_dict, to_dict
from stream3r_core.errors import DataError
from stream3r_core.evaluation import protocols
from stream3r_core.evaluation.datasets.frames import Clip
from stream3r_core.evaluation.protocols import Network, crop_resize
from stream3r_core.geometry import invert_se3
from stream3r_core.image import prepare
from stream3r_core.pipeline import load_configured_model
from stream3r_core.types import FramePrediction

SCALE = 0.4


class OracleModel:
    """Only the sizes of a network."""

    config = ModelConfig(img_size=126)


class OracleNetwork(Network):
    """Answers with true depth and pose in the frame of the first image, at another scale.

    Which frame an image belongs to is told by its grey level, which resizing keeps.
    """

    def __init__(self, clip):
        super().__init__(OracleModel(), CONFIG)
        object.__setattr__(self, 'clip', clip)
        levels = np.array([f.load_image().mean() for f in clip.frames])
        object.__setattr__(self, 'levels', levels)

    def predict(self, images, image=protocols.EVAL_LOADER, outputs=('depth',)):
        first = None
        for one in images:
            frame = self.clip.frames[np.abs(self.levels - one.mean()).argmin()]
            rgb, geometry = prepare(one, image, self.model.config)
            height, width = rgb.shape[-2:]
            _, depth, K = crop_resize(
                frame.load_image(), frame.load_depth_m(), frame.K, (height, width)
            )
            pose = torch.from_numpy(frame.T_world_camera)
            first = invert_se3(pose) if first is None else first
            T = first @ pose
            T[:3, 3] *= SCALE
            depth = torch.from_numpy(np.ascontiguousarray(depth)).float() * SCALE
            yield FramePrediction(
                *(0, None, T.float(), torch.from_numpy(K).float(), rgb.permute(1, 2, 0)),
                *(depth, torch.ones_like(depth), None, None, geometry),
            )


@pytest.fixture(scope='module')
def clip():
    room = room_clip(num_frames=10, height=96, width=128)
    frames = (
        dataclasses.replace(f, load_image=partial(np.full, (96, 128, 3), 20 * i, np.uint8))
        for i, f in enumerate(room.frames)
    )
    return dataclasses.replace(room, frames=tuple(frames))


@pytest.fixture(scope='module')
def oracle(clip):
    return OracleNetwork(clip)


def test_mono_depth_of_the_truth(clip, oracle):
    scores = protocols.mono_depth(clip, oracle, None, None)
    assert scores.numbers['AbsRel'] < 0.05 and scores.numbers['δ < 1.25'] > 0.95
    assert scores.weight == 10 * 96 * 128


def test_video_depth_of_the_truth_knows_its_alignments(clip, oracle):
    numbers = protocols.video_depth(clip, oracle, None, None).numbers
    assert numbers['AbsRel, scale'] < 0.05  # bicubic resampling at edges
    assert numbers['AbsRel, metric'] == pytest.approx(1 - SCALE, abs=0.02)
    assert set(numbers) == {
        f'{metric}, {alignment}'
        for metric in ('AbsRel', 'δ < 1.25')
        for alignment in ('scale', 'lad2', 'metric')
    }


def test_images_without_true_depth_are_counted_not_judged(clip, oracle):
    blank = dataclasses.replace(clip.frames[3], load_depth_m=lambda: np.zeros((96, 128)))
    frames = (*clip.frames[:3], blank, *clip.frames[4:])
    scores = protocols.mono_depth(dataclasses.replace(clip, frames=frames), oracle, None, None)
    assert scores.remarks == ('1 images without valid true depth',)
    assert scores.weight == 9 * 96 * 128


def test_camera_poses_of_the_truth(clip, oracle):
    numbers = protocols.camera_pose(clip, oracle).numbers
    assert max(numbers.values()) < 1e-4
    assert list(numbers) == [
        'ATE RMSE (m)',
        'RPE translation RMSE (m)',
        'RPE rotation RMSE (deg)',
    ]


def test_relative_poses_of_the_truth_take_ten_frames_of_a_long_clip(clip, oracle, monkeypatch):
    assert protocols.co3d_pose(clip, oracle).numbers == {}  # fewer than 50 frames
    monkeypatch.setattr(protocols, 'CO3D_MIN_LENGTH', 10)
    auc = protocols.co3d_pose(clip, oracle).numbers
    assert list(auc) == ['AUC@30', 'AUC@15', 'AUC@5', 'AUC@3']
    assert min(auc.values()) > 0.99


def test_images_of_relative_poses_are_squashed_bicubically(clip, monkeypatch):
    shown = []

    class Watched(OracleNetwork):
        def predict(self, images, image, outputs=('depth',)):
            shown.extend(images)
            return super().predict(shown, image, outputs)

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 128, 3), np.uint8) for _ in clip.frames]
    frames = tuple(
        dataclasses.replace(f, load_image=lambda i=i: i) for f, i in zip(clip.frames, images)
    )
    monkeypatch.setattr(protocols, 'CO3D_MIN_LENGTH', 10)
    noise = dataclasses.replace(clip, frames=frames)
    protocols.co3d_pose(noise, Watched(noise))
    square = Image.fromarray(images[0]).resize((56, 56), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(shown[0], np.asarray(square))


def test_a_clip_without_true_poses_is_refused(clip, oracle):
    frames = tuple(dataclasses.replace(f, T_world_camera=None) for f in clip.frames)
    with pytest.raises(DataError, match='true pose'):
        protocols.camera_pose(Clip('bare', frames), oracle)
    with pytest.raises(DataError, match='depth, pose and intrinsics'):
        protocols.reconstruction(Clip('bare', frames), oracle)


def test_reconstruction_of_the_truth(clip, oracle):
    pytest.importorskip('open3d', reason="needs Open3D: pip install 'stream3r_ros[open3d]'")
    numbers = protocols.reconstruction(clip, oracle).numbers
    assert numbers['Acc mean (m)'] < 1e-3 and numbers['Comp mean (m)'] < 1e-3
    assert numbers['NC mean'] > 0.99


@pytest.mark.parametrize('size_hw', [(12, 16), (96, 130), (20, 16)])
def test_crop_and_resize_keep_every_ray(size_hw):
    scene = Scene(camera(fx=40, fy=41, cx=13.2, cy=12.6))
    image, depth, K = crop_resize(scene.images[0], scene.depth_m[0], scene.K, size_hw)
    assert image.shape == (*size_hw, 3) and depth.shape == size_hw
    # The nearest depth may come from half a source pixel away, along both axes.
    slopes = [np.abs(slope).max() for slope in np.gradient(scene.depth_m[0])]
    distance_m = distance_to_plane_m(depth, K, scene.T_world_camera[0])
    assert distance_m.max() < 0.5 * sum(slopes) + 1e-6


def test_the_published_crop_of_a_vga_image():
    K = np.array([[525.0, 0, 320], [0, 525, 240], [0, 0, 1]])
    image, depth = np.zeros((480, 640, 3), np.uint8), np.ones((480, 640), np.float32)
    image, depth, K = crop_resize(image, depth, K, (392, 518))
    assert image.shape == (392, 518, 3) and depth.shape == (392, 518)
    assert K[0, 0] == pytest.approx(525 * 523 / 640) and K[1, 1] == pytest.approx(525 * 392 / 480)


def test_a_principal_point_outside_of_the_image_is_refused():
    image, depth = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.float32)
    with pytest.raises(DataError, match='principal point'):
        crop_resize(image, depth, camera(cx=45), (8, 8))
    with pytest.raises(DataError, match='differ in size'):
        crop_resize(image, depth[::2], camera(), (8, 8))


@pytest.mark.parametrize('mode', ['causal', 'window', 'full', 'stac', 'stac_paper'])
def test_every_attention_mode_answers_each_frame_once_and_in_order(mode):
    clip = room_clip(num_frames=6, height=96, width=128)
    config = from_dict(type(CONFIG), {**to_dict(CONFIG), 'session': {'mode': mode}})
    network = Network(load_configured_model(config.model), config)
    images = [frame.load_image() for frame in clip.frames]
    predictions = list(network.predict(images))
    assert [p.index for p in predictions] == list(range(6))
    size = network.model.config.img_size
    assert {tuple(p.depth.shape) for p in predictions} == {(size * 3 // 4 // 8 * 8, size)}
