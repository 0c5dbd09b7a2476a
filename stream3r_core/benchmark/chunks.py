"""What a frame costs when several are processed together (cache.chunk_size)."""

import dataclasses

import numpy as np

from stream3r_core.benchmark.measure import Plan, camera_images, percentiles, timed
from stream3r_core.config import CoreConfig
from stream3r_core.pipeline import make_session


def measure_chunks(
    model, config: CoreConfig, plan: Plan, sizes: tuple[int, ...]
) -> list[dict[str, float]]:
    """Measure streams of ``max(plan.frames)`` frames in chunks of each size (modes with a cache).

    A row has the seconds of a whole chunk, image to prediction, over the second half of the
    stream, and ``per_frame_s``, its median over the frames of a chunk. The last image of a chunk
    waits ``p50_s`` for its pose, the first one also until the chunk is full.
    """
    return [_row(model, _with_chunks(config, plan, size), plan, size) for size in sizes]


def _with_chunks(config: CoreConfig, plan: Plan, size: int) -> CoreConfig:
    name = 'cache_paper' if config.session.mode == 'stac_paper' else 'cache'
    cache = dataclasses.replace(getattr(config, name), chunk_size=size)
    image = dataclasses.replace(config.image, long_side=plan.width, fit='crop')
    return dataclasses.replace(config, image=image, **{name: cache})


def _row(model, config: CoreConfig, plan: Plan, size: int) -> dict[str, float]:
    session, views = make_session(model, config), camera_images(plan)
    num_chunks = max(2, -(-max(plan.frames) // size))
    seconds = []
    for _ in range(plan.repeats):
        session.reset()
        for chunk in range(num_chunks):
            images = [views[(chunk * size + i) % len(views)] for i in range(size)]
            took, _ = timed(lambda x=images: session.step_chunk(x), model.device)
            if chunk >= num_chunks // 2:
                seconds.append(took)
    row = percentiles(np.array(seconds))
    return {'chunk_size': size, 'per_frame_s': row['p50_s'] / size, **row}
