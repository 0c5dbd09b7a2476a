"""From image to pose, depth and map: the one path that node, replay and demo share."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator

import torch

from stream3r_core.checkpoints import default_dtype, load_model
from stream3r_core.compilation import compile_network
from stream3r_core.config import CoreConfig, MappingConfig, WeightsConfig
from stream3r_core.errors import ConfigError, InputError, first_line
from stream3r_core.geometry import transform_points
from stream3r_core.gpu_memory import free_gpu_memory, is_out_of_memory, limit_gpu_memory
from stream3r_core.image import prepare_photos
from stream3r_core.int8_weights import with_int8_weights
from stream3r_core.kernels.processor import has_bfloat16
from stream3r_core.mapping import VoxelMap
from stream3r_core.refinement import AsStated, PoseRefiner, refines
from stream3r_core.session import StreamSession, to_prediction
from stream3r_core.types import FramePrediction
from stream3r_core.uncertainty import Uncertainty, uncertainty_name

_log = logging.getLogger(__name__)


class Reconstructor:
    """A streaming session and the map that its frames build.

    Nothing moves what is in the map: see :mod:`stream3r_core.slam` for what closes loops.
    """

    num_moves = placed_at = 0  # corrections of poses and map

    def __init__(self, model, config: CoreConfig):
        self.config = config
        self.session = make_session(model, config)
        self.map = VoxelMap(config.mapping)
        self.refiner = make_refiner(model, config)
        self._T_world_session = torch.eye(4)

    def process(self, image, stamp_ns: int | None = None, K=None) -> FramePrediction:
        """Track one camera image and add it to the map; return its prediction, on the CPU.

        Arguments and errors as :meth:`StreamSession.step`. An image that cannot be used changes
        neither session nor map. Only without chunks; :meth:`feed` takes both.
        """
        if self.session.chunk_size > 1:
            raise ConfigError(
                f'chunks of {self.session.chunk_size} frames answer {self.session.chunk_size} '
                'at a time: use feed and flush, or cache.chunk_size=1'
            )
        return self.feed(image, stamp_ns, K)[0]

    def feed(self, image, stamp_ns: int | None = None, K=None) -> list[FramePrediction]:
        """Take one camera image; return the predictions that it completes, on the CPU.

        That is one, or with a chunk size n > 1 none until the chunk is full and then all n.
        """
        answer = self.session.step(image, stamp_ns, K)
        if answer is None:
            return []
        return self._map(answer if isinstance(answer, list) else [answer])

    def flush(self) -> list[FramePrediction]:
        """Return the predictions of images that wait for their chunk to fill."""
        return self._map(self.session.flush())

    def _map(self, predictions: list[FramePrediction]) -> list[FramePrediction]:
        predictions = [
            self._in_world(self.refiner.refine(prediction.to('cpu'))) for prediction in predictions
        ]
        for prediction in predictions:
            if not prediction.still:
                self.map.integrate(prediction)
        return predictions

    def _in_world(self, prediction: FramePrediction) -> FramePrediction:
        T = self._T_world_session
        if torch.equal(T, torch.eye(4)):
            return prediction
        points = prediction.world_points
        return dataclasses.replace(
            prediction,
            T_world_camera=T @ prediction.T_world_camera,
            world_points=None if points is None else transform_points(T, points),
        )

    def configure(self, mapping: MappingConfig) -> None:
        """Replace the thresholds of the points to come."""
        self.map.config = mapping

    def figures(self) -> dict[str, int]:
        """Return what was done so far beside sessions and map."""
        return self.refiner.figures()

    def close(self) -> None:
        """Nothing to end: no thread of its own."""

    def reset(self, keep_map: bool = False) -> None:
        """Start a new session, whose first frame is the new world frame, and clear the map."""
        self.session.reset()
        self._T_world_session = torch.eye(4)
        if not keep_map:
            self.map.clear()

    def restart_at(self, T_world_camera: torch.Tensor) -> None:
        """Start a new session whose first camera stands at a pose [4, 4] of the present world.

        The map stays and grows on. The scale of the new session is its own: without a metric one
        it need not be that of the map.
        """
        self.session.reset()
        self._T_world_session = T_world_camera.float().cpu()

    def release_session(self) -> None:
        """Give the memory of the session back; an empty one, as after a reset, takes its place."""
        self.session = make_session(self.session.model, self.config)  # allocates when it is fed
        free_gpu_memory(self.session.model.device)


def incomplete_memory(error: Exception) -> InputError:
    """Return what to say of an image whose step has left a session ``is_broken``.

    Whoever feeds the session starts a new one from the last pose that can be trusted.
    """
    return InputError(
        f'{type(error).__name__} while the memory of the stream was being stored ({error}): a new '
        'session goes on from the last trusted pose, the map stays'
    )


def make_session(model, config: CoreConfig) -> StreamSession:
    """Return the streaming session that a configuration asks for."""
    return StreamSession(
        model,
        **dataclasses.asdict(config.session),
        image=config.image,
        outputs=needed_outputs(config),
        cache=config.cache_paper if config.session.mode == 'stac_paper' else config.cache,
    )


def make_refiner(model, config: CoreConfig) -> PoseRefiner | AsStated:
    """Return what refines the poses of a session, or leaves them as they are."""
    wanted = refines(model.config, config.refinement)
    return PoseRefiner(config.refinement) if wanted else AsStated()


def known_uncertainty(model, config: CoreConfig) -> Uncertainty | None:
    """Return what is known of the errors of a network whose poses are refined, or are not."""
    name = uncertainty_name(config.session.mode, refines(model.config, config.refinement))
    if model.uncertainties and name not in model.uncertainties and config.session.mode != 'full':
        _log.warning(
            'covariances are unknown: the errors of these weights are fitted for %s, not for %s '
            '(python -m stream3r_core.evaluation.calibration)',
            ', '.join(model.uncertainties),
            name,
        )
    return model.uncertainties.get(name)


def needed_outputs(config: CoreConfig) -> tuple[str, ...]:
    """Return the dense heads that are read; poses are always computed.

    Depth and its confidence always are: tracking state and covariances are fitted to them.
    """
    return ('depth', 'points') if config.mapping.source == 'points' else ('depth',)


def reconstruct_photos(model, images: Iterable, config: CoreConfig) -> Iterator[FramePrediction]:
    """Yield the predictions of an unordered set of photos that all see each other (mode full).

    ``images`` as for :meth:`StreamSession.step`, of any sizes; memory grows with their number.
    The world frame is the camera frame of the first photo.
    """
    frames, geometries = prepare_photos(images, config.image, model.config)
    with torch.inference_mode():
        raw = model(frames[None].to(model.device), mode='full', outputs=needed_outputs(config))
    raw.pop('pose_enc_list')
    for index, geometry in enumerate(geometries):
        one = {name: value[0, index] for name, value in raw.items()}
        yield to_prediction(one, frames[index], geometry, index).to('cpu')


def load_configured_model(config: WeightsConfig):
    """Load the network that a configuration names, on the device and in the type it asks for."""
    device = resolve_device(config.device)
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if config.max_gpu_memory:
        limit_gpu_memory(config.max_gpu_memory, device)
    is_small = config.weight_dtype == 'int8'
    try:
        model = load_model(
            config.preset,
            weights=config.weights or None,
            revision=config.revision or None,
            device='cpu' if is_small else device,  # the GPU never sees the wide weights
            dtype=resolve_dtype(config.dtype, device),
        )
        if is_small:
            with_int8_weights(model).to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f'{config.preset} does not fit into the memory of {device}: free some, raise '
            'model.max_gpu_memory, or use a smaller model.dtype or model.weight_dtype '
            f'({first_line(error)})'
        ) from error
    return compile_network(model) if config.compile else model


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision for ``name``; ``'auto'`` takes what the device multiplies fastest."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cpu' and has_bfloat16():
        return torch.bfloat16
    return default_dtype(device)


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``name``; ``'auto'`` takes the GPU when there is one."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"model.device: {name!r} is no torch device; use 'auto', 'cpu' or 'cuda'"
        ) from error
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(
            f'model.device: {name!r} was asked for, but this torch ({torch.__version__}) sees no '
            "CUDA device; use 'cpu' or install the CUDA build"
        )
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(
            f'model.device: {name!r} was asked for, but there are {count} CUDA devices; the last '
            f"one is 'cuda:{count - 1}'"
        )
    return device
