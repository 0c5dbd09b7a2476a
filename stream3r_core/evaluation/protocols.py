"""The published evaluation protocols: one clip in, its numbers out (model.md section 21)."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stream3r_core.config import CoreConfig, ImageConfig, ModelConfig
from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.frames import Clip, Frame
from stream3r_core.evaluation.depth import (
    DepthAccumulator,
    DepthErrors,
    depth_at,
    depth_errors,
    weighted_mean,
)
from stream3r_core.evaluation.reconstruction import align_point_maps, centre_crop, map_errors
from stream3r_core.evaluation.trajectory import Trajectory, ate, relative_pose_auc, rpe
from stream3r_core.geometry import unproject_to_world
from stream3r_core.pipeline import needed_outputs, reconstruct_photos
from stream3r_core.session import StreamSession
from stream3r_core.types import FramePrediction

EVAL_LOADER = ImageConfig(fit='eval')
FULL_SIDE = 518  # pixels that the published sizes refer to
RECON_HEIGHT, RECON_CROP, CO3D_SIDE = 392, 224, 224
CO3D_FRAMES, CO3D_MIN_LENGTH = 10, 50


@dataclass(frozen=True)
class ImageSizes:
    """Sides of the images of the protocols, pixels."""

    long_side: int
    recon_height: int
    recon_crop: int
    co3d_side: int


def image_sizes(config: ModelConfig) -> ImageSizes:
    """Return what a network sees: the published sizes, shrunk with its image side."""
    sides = (
        max(1, round(side * config.img_size / FULL_SIDE / config.patch_size)) * config.patch_size
        for side in (RECON_HEIGHT, RECON_CROP, CO3D_SIDE)
    )
    return ImageSizes(config.img_size, *sides)


@dataclass(frozen=True)
class Network:
    """A network and the way it is run: session, cache and source of points of ``config``."""

    model: torch.nn.Module
    config: CoreConfig

    def new_session(self, image: ImageConfig, outputs: Collection[str]) -> StreamSession:
        """Return an empty session that loads images as ``image`` says."""
        config = self.config
        return StreamSession(
            self.model,
            **dataclasses.asdict(config.session),
            image=image,
            outputs=tuple(outputs),
            cache=config.cache_paper if config.session.mode == 'stac_paper' else config.cache,
        )

    def predict(
        self,
        images: Iterable[np.ndarray],
        image: ImageConfig = EVAL_LOADER,
        outputs: Collection[str] = ('depth',),
    ) -> Iterator[FramePrediction]:
        """Yield the predictions of one sequence, on the CPU, in order."""
        if self.config.session.mode == 'full':
            config = dataclasses.replace(self.config, image=image)
            yield from reconstruct_photos(self.model, images, config)
            return
        session = self.new_session(image, outputs)
        for one in images:
            answer = session.step(one)
            if answer is not None:
                yield from (p.to('cpu') for p in _listed(answer))
        yield from (p.to('cpu') for p in session.flush())

    @property
    def image_sizes(self) -> ImageSizes:
        """Sides of the images that it is shown."""
        return image_sizes(self.model.config)

    @property
    def recon_outputs(self) -> tuple[str, ...]:
        """Dense heads that a reconstruction needs."""
        return needed_outputs(self.config)


def _listed(answer) -> list[FramePrediction]:
    return answer if isinstance(answer, list) else [answer]


@dataclass(frozen=True)
class Scores:
    """Numbers of one clip by metric name, its weight in the average, remarks."""

    numbers: dict[str, float]
    weight: float = 1.0
    remarks: tuple[str, ...] = ()


def mono_depth(
    clip: Clip, network: Network, max_depth_m: float | None, clip_depth_m: float | None
) -> Scores:
    """Each image alone, median alignment per image (21.2)."""
    errors, blank = [], 0
    for frame in clip.frames:
        if frame.load_depth_m is None:
            continue
        truth_m = frame.load_depth_m()
        (prediction,) = network.predict([frame.load_image()])
        if not _has_depth(truth_m, max_depth_m):
            blank += 1
            continue
        predicted = depth_at(prediction, truth_m.shape)
        errors.append(depth_errors(predicted, truth_m, 'median', max_depth_m, clip_depth_m))
    mean = weighted_mean(errors)
    remarks = (f'{blank} images without valid true depth',) if blank else ()
    return Scores(_depth_numbers(mean, ''), mean.valid_pixels, remarks)


def video_depth(
    clip: Clip, network: Network, max_depth_m: float | None, clip_depth_m: float | None
) -> Scores:
    """The whole clip through one session, one alignment for all frames (21.3)."""
    pixels = DepthAccumulator(max_depth_m)
    for frame, prediction in zip(clip.frames, network.predict(_images(clip))):
        if frame.load_depth_m is not None:
            truth_m = frame.load_depth_m()
            pixels.add(depth_at(prediction, truth_m.shape), truth_m)
    numbers: dict[str, float] = {}
    for alignment in ('scale', 'lad2', 'metric'):
        errors = pixels.errors(alignment, clip_depth_m)
        numbers |= _depth_numbers(errors, f', {alignment}')
    return Scores(numbers, errors.valid_pixels)


def _has_depth(truth_m: np.ndarray, max_depth_m: float | None) -> bool:
    return bool(((truth_m > 0) & (truth_m < (max_depth_m or np.inf))).any())


def _depth_numbers(errors: DepthErrors, suffix: str) -> dict[str, float]:
    return {f'AbsRel{suffix}': errors.abs_rel, f'δ < 1.25{suffix}': errors.delta_1}


def camera_pose(clip: Clip, network: Network) -> Scores:
    """Trajectory of one session after Sim(3) alignment (21.4)."""
    truth, estimate = _posed(clip, network.predict(_images(clip)))
    return Scores(
        {
            'ATE RMSE (m)': ate(truth, estimate).rmse,
            'RPE translation RMSE (m)': rpe(truth, estimate).rmse,
            'RPE rotation RMSE (deg)': rpe(truth, estimate, 'rotation').rmse,
        }
    )


def _images(clip: Clip) -> Iterator[np.ndarray]:
    return (frame.load_image() for frame in clip.frames)


def _posed(clip: Clip, predictions: Iterable[FramePrediction]) -> tuple[Trajectory, Trajectory]:
    """True and estimated trajectories of the frames that have a true pose."""
    pairs = [
        (frame.stamp_ns, frame.T_world_camera, prediction.T_world_camera.double().numpy())
        for frame, prediction in zip(clip.frames, predictions)
        if frame.T_world_camera is not None
    ]
    if not pairs:
        raise DataError(f'{clip.name}: no frame has a true pose')
    stamps, truth, estimate = (np.array(column) for column in zip(*pairs))
    return Trajectory(stamps, truth, 'truth'), Trajectory(stamps, estimate, 'estimate')


def co3d_pose(clip: Clip, network: Network) -> Scores:
    """Relative poses of ten random frames, squashed to a square (21.5).

    The frames are drawn by a seeded generator of ours; which ones were drawn for the published
    numbers is not known.
    """
    if len(clip) < CO3D_MIN_LENGTH:
        return Scores({}, 0, (f'clips of fewer than {CO3D_MIN_LENGTH} frames are left out',))
    chosen = np.random.default_rng(0).choice(len(clip), CO3D_FRAMES, replace=False)
    clip = clip.take(sorted(chosen))
    side = network.image_sizes.co3d_side
    squashed = (_squashed(image, side) for image in _images(clip))
    loader = ImageConfig(long_side=side, fit='crop')
    truth, estimate = _posed(clip, network.predict(squashed, loader))
    auc = relative_pose_auc(truth, estimate)
    return Scores({f'AUC@{threshold}': value for threshold, value in auc.items()})


def _squashed(image: np.ndarray, side: int) -> np.ndarray:
    """The image as a square, like the loader of section 15 bicubic whatever its size."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def reconstruction(
    clip: Clip, network: Network, icp: str = 'point_to_point', max_distance_m: float = 0.1
) -> Scores:
    """Point maps of all frames against the true ones (21.6); raises without Open3D."""
    views = [_recon_view(frame, network) for frame in clip.frames if _is_complete(frame)]
    if not views:
        raise DataError(f'{clip.name}: no frame has depth, pose and intrinsics')
    images, truth, valid, poses = zip(*views)
    predictions = network.predict(images, outputs=network.recon_outputs)
    predicted = torch.stack([_world_points(p, network) for p in predictions])
    truth, valid = torch.stack(truth), torch.stack(valid)
    valid &= predicted.isfinite().all(dim=-1)
    aligned = align_point_maps(predicted, truth, valid, poses[0])
    side = network.image_sizes.recon_crop
    inside = centre_crop(valid, side)
    clouds = (centre_crop(maps, side)[inside] for maps in (aligned.prediction, aligned.truth))
    result = map_errors(*(c.double().numpy() for c in clouds), icp, max_distance_m)
    summary = result.errors.summary
    return Scores(
        {
            'Acc mean (m)': summary['accuracy_mean_m'],
            'Acc median (m)': summary['accuracy_median_m'],
            'Comp mean (m)': summary['completeness_mean_m'],
            'Comp median (m)': summary['completeness_median_m'],
            'NC mean': summary['normal_consistency'],
            'NC median': summary['normal_consistency_median'],
        },
        remarks=(f'ICP on a {result.icp.voxel_m:.3g} m grid',) if result.icp.voxel_m else (),
    )


def _is_complete(frame: Frame) -> bool:
    known = (frame.load_depth_m, frame.K, frame.T_world_camera)
    return all(fact is not None for fact in known)


def _world_points(prediction: FramePrediction, network: Network) -> Tensor:
    """Predicted points [H, W, 3]: unprojected depth (STream3R) or the point head (StreamVGGT)."""
    if network.config.mapping.source == 'points':
        return prediction.world_points.float()
    depth = prediction.depth.float()
    return unproject_to_world(depth, prediction.K, prediction.T_world_camera)


def _recon_view(frame: Frame, network: Network) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Image [H, W, 3], true world points [H, W, 3], validity [H, W] and pose at network size."""
    image, depth_m = frame.load_image(), frame.load_depth_m()
    long_side, short_side = network.image_sizes.long_side, network.image_sizes.recon_height
    portrait = image.shape[0] > image.shape[1]
    size_hw = (long_side, short_side) if portrait else (short_side, long_side)
    image, depth_m, K = crop_resize(image, depth_m, frame.K, size_hw)
    pose = torch.from_numpy(np.array(frame.T_world_camera))
    depth = torch.from_numpy(depth_m).double()
    points = unproject_to_world(depth, torch.from_numpy(K), pose)
    return image, points.float(), depth > 0, pose


def crop_resize(
    image: np.ndarray, depth_m: np.ndarray, K: np.ndarray, size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop around the principal point, resize to cover ``size_hw``, crop the centre (section 20).

    ``image`` [H, W, 3] uint8 by Lanczos when it shrinks, ``depth_m`` [H, W] by nearest pixel;
    ``K`` keeps every ray, pixel centres lying half a pixel inside.
    """
    if depth_m.shape != image.shape[:2]:
        raise DataError(f'depth {depth_m.shape} and image {image.shape[:2]} differ in size')
    top, bottom = _centred(round(K[1, 2]), image.shape[0])
    left, right = _centred(round(K[0, 2]), image.shape[1])
    image, depth_m = image[top:bottom, left:right], depth_m[top:bottom, left:right]
    height, width = image.shape[:2]
    scale = max(size_hw[0] / height, size_hw[1] / width)
    covered_hw = max(round(height * scale), size_hw[0]), max(round(width * scale), size_hw[1])
    image = _resized(image, covered_hw)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(covered_hw, depth_m.shape)
    )
    y, x = ((covered - new) // 2 for covered, new in zip(covered_hw, size_hw))
    window = slice(y, y + size_hw[0]), slice(x, x + size_hw[1])
    factors = np.array([covered_hw[1] / width, covered_hw[0] / height])
    K = K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    K[:2] *= factors[:, None]
    K[:2, 2] += 0.5 * factors - 0.5 - (x, y)
    return image[window], depth_m[rows][:, columns][window], K


def _centred(centre: int, side: int) -> tuple[int, int]:
    """The longest interval around ``centre`` inside 0..side."""
    half = min(centre, side - centre)
    if half <= 0:
        raise DataError(f'the principal point {centre} lies outside of an image side of {side}')
    return centre - half, centre + half


def _resized(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    shrinks = size_hw[0] < image.shape[0]
    resampling = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size_hw[::-1], resampling))
