"""What an evaluation feeds: a stream of frames, or photos that are all seen together."""

import dataclasses

import numpy as np

from stream3r_core.config import CoreConfig
from stream3r_core.errors import InputError
from stream3r_core.image import prepare
from stream3r_core.mapping import VoxelMap
from stream3r_core.pipeline import Reconstructor, reconstruct_photos
from stream3r_core.types import FramePrediction


class PhotoSet:
    """Collects photos until :meth:`flush`; memory grows with their number."""

    def __init__(self, model, config: CoreConfig):
        self.model, self.config = model, config
        self.map = VoxelMap(config.mapping)
        self._photos: list[tuple[np.ndarray, int | None]] = []

    def feed(self, image: np.ndarray, stamp_ns: int | None = None, K=None) -> list:
        """Keep a photo; the answer comes with :meth:`flush`."""
        if K is not None:
            raise InputError("mode 'full' takes no known intrinsics")
        prepare(image, self.config.image, self.model.config)  # refuses what cannot be used
        self._photos.append((image, stamp_ns))
        return []

    def flush(self) -> list[FramePrediction]:
        """Reconstruct all photos at once."""
        photos, self._photos = self._photos, []
        if not photos:
            return []
        images, stamps = zip(*photos)
        predictions = reconstruct_photos(self.model, images, self.config)
        stamped = [dataclasses.replace(p, stamp_ns=s) for p, s in zip(predictions, stamps)]
        for prediction in stamped:
            self.map.integrate(prediction)
        return stamped

    def reset(self) -> None:
        """Forget photos and map."""
        self._photos = []
        self.map.clear()

    @property
    def cache_bytes(self) -> int:
        """Bytes of a cache: there is none."""
        return 0


class Stream(Reconstructor):
    """A Reconstructor that tells its network and the size of its caches."""

    @property
    def model(self):
        """The network."""
        return self.session.model

    @property
    def cache_bytes(self) -> int:
        """Bytes of live keys and values of both caches."""
        return self.session.cache.num_bytes + self.session.camera_cache.num_bytes


def make_pipeline(model, config: CoreConfig) -> Stream | PhotoSet:
    """Return what the session mode of ``config`` asks for."""
    return (PhotoSet if config.session.mode == 'full' else Stream)(model, config)
