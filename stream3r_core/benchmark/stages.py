"""Where the time of a frame goes: every moment of it belongs to exactly one stage."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from stream3r_core.cache.base import KVCache
from stream3r_core.pipeline import Reconstructor

FRAME = 'other'  # what no stage inside the frame accounts for
STAGES = (
    'preprocess',
    'encoder',
    'frame blocks',
    'global blocks',
    'camera head',
    'depth head',
    'point head',
    'cache',
    'refine',
    'map',
    'publish',
    FRAME,
)
_CACHE_WORK = ('begin', 'update', 'record', 'record_update', 'commit')


class StageClock:
    """Sums the seconds of nested stages; time in an inner stage does not count for the outer."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._open: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    def enter(self, stage: str) -> None:
        """Begin a stage; the one around it stands still."""
        self._charge()
        self._open.append(stage)

    def leave(self) -> None:
        """End the innermost stage."""
        self._charge()
        self._open.pop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block for a stage."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def take(self) -> dict[str, float]:
        """Return the seconds of every stage since the last call."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _charge(self) -> None:
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watched(reconstructor: Reconstructor, clock: StageClock) -> Iterator[None]:
    """Let ``clock`` see the stages of a reconstructor for the time of the block."""
    session, model = reconstructor.session, reconstructor.session.model
    modules = {
        'encoder': [model.aggregator.patch_embed],
        'frame blocks': model.aggregator.frame_blocks,
        'global blocks': model.aggregator.global_blocks,
        'camera head': [model.camera_head],
        'depth head': [model.depth_head],
        'point head': [model.point_head],
    }
    with ExitStack() as stack:
        for stage, parts in modules.items():
            for module in parts:
                stack.enter_context(_hooked(module, stage, clock))
        for owner, name, stage in (
            (session, '_prepared', 'preprocess'),
            *((cache, name, 'cache') for cache in _caches(session) for name in _CACHE_WORK),
            (reconstructor.refiner, 'refine', 'refine'),
            (reconstructor.map, 'integrate', 'map'),
        ):
            stack.enter_context(_wrapped(owner, name, stage, clock))
        yield


def _caches(session: Any) -> tuple[KVCache, KVCache]:
    return session.cache, session.camera_cache


@contextmanager
def _hooked(module: nn.Module, stage: str, clock: StageClock) -> Iterator[None]:
    hooks = (
        module.register_forward_pre_hook(lambda *_: clock.enter(stage)),
        module.register_forward_hook(lambda *_: clock.leave()),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _wrapped(owner: Any, name: str, stage: str, clock: StageClock) -> Iterator[None]:
    method = getattr(owner, name)

    @wraps(method)
    def timed(*args, **kwargs):
        with clock.stage(stage):
            return method(*args, **kwargs)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)
