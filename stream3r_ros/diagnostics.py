"""What the node knows of itself: rates, latency, losses and memory, as a line and a message."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from stream3r_ros.odometry import Sigmas
from stream3r_ros.tracking import OK, Quality

RATE_WINDOW_S = 5.0


@dataclass(frozen=True)
class FrameFigures:
    """Figures of the image stream; rates over the last seconds, latency over recent frames."""

    num_received: int
    num_processed: int
    rate_in_hz: float
    rate_out_hz: float
    latency_p50_ms: float  # arrival of the image to its pose, odometry and path; NaN: no frame yet
    latency_p95_ms: float


@dataclass(frozen=True)
class ReconstructionFigures:
    """What the session and the map hold."""

    cache_tokens: int = 0
    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    map_points: int = 0
    map_version: int = 0  # counts the changes of the map
    backend: Mapping[str, int] = field(default_factory=dict)  # submaps, loops, corrections
    frames_without_tf: int = 0  # a transform from /tf was missing: none was broadcast
    frames_without_scale: int = 0  # a depth image or transform that gives metres was missing
    metres_per_unit: float | None = None  # None: the scale is arbitrary
    tracking: str = OK  # or 'DEGRADED', 'LOST'
    quality: Quality | None = None  # of the last frame
    sigmas: Sigmas | None = None  # of the last pose; None: not known
    gaps: int = 0  # pauses between images that were too long
    restarts: Mapping[str, int] = field(default_factory=dict)  # reason -> new sessions
    gpu_bytes: int | None = None  # None: no GPU in use


@dataclass(frozen=True)
class NodeStatus:
    """All that the status line and /diagnostics say."""

    state: str  # 'unconfigured', 'inactive', 'active', 'paused', 'failed'
    frames: FrameFigures
    drops: Mapping[str, int] = field(default_factory=dict)  # reason -> images
    losses: Mapping[str, int] = field(default_factory=dict)  # reason -> images that never came
    reconstruction: ReconstructionFigures = field(default_factory=ReconstructionFigures)
    has_camera_info: bool = False
    problem: str = ''  # what is wrong and what to do, if anything

    @property
    def level(self) -> bytes:
        """OK, WARN or ERROR of diagnostic_msgs/DiagnosticStatus."""
        if self.state == 'failed':
            return DiagnosticStatus.ERROR
        is_well = not self.problem and self.reconstruction.tracking == OK
        return DiagnosticStatus.OK if is_well else DiagnosticStatus.WARN

    def sentence(self) -> str:
        """Say it in one line."""
        frames, made = self.frames, self.reconstruction
        parts = [
            f'{self.state}: {frames.rate_out_hz:.1f} of {frames.rate_in_hz:.1f} images/s',
            f'{frames.num_processed} processed',
            f'{sum(self.drops.values())} dropped{_listed(self.drops)}',
        ]
        if self.losses:
            parts.append(f'{sum(self.losses.values())} lost on the way{_listed(self.losses)}')
        if frames.num_processed:
            parts.append(
                f'latency {frames.latency_p50_ms:.0f} ms (p95 {frames.latency_p95_ms:.0f} ms)'
            )
        parts.append(f'tracking {made.tracking}')
        scale = f'{made.metres_per_unit:.3f} m per unit' if made.metres_per_unit else 'arbitrary'
        parts.append(f'scale {scale}')
        parts.append(f'map {made.map_points} points')
        parts.append(f'cache {made.cache_tokens} tokens, {made.cache_bytes / 1e6:.1f} MB')
        if made.frames_without_tf:
            parts.append(f'{made.frames_without_tf} without transform')
        if self.problem:
            parts.append(self.problem)
        return '; '.join(parts)

    def values(self) -> dict[str, str]:
        """Return every figure by name, unit in the name."""
        frames, made = self.frames, self.reconstruction
        values = {
            'state': self.state,
            'rate_in_hz': f'{frames.rate_in_hz:.2f}',
            'rate_out_hz': f'{frames.rate_out_hz:.2f}',
            'latency_p50_ms': f'{frames.latency_p50_ms:.1f}',
            'latency_p95_ms': f'{frames.latency_p95_ms:.1f}',
            'images_received': str(frames.num_received),
            'images_processed': str(frames.num_processed),
            'images_dropped': str(sum(self.drops.values())),
            **{f'images_dropped.{reason}': str(n) for reason, n in sorted(self.drops.items())},
            'images_lost': str(sum(self.losses.values())),
            **{f'images_lost.{reason}': str(n) for reason, n in sorted(self.losses.items())},
            'camera_info': 'received' if self.has_camera_info else 'none',
            'cache_tokens': str(made.cache_tokens),
            'cache_bytes': str(made.cache_bytes),
            'cache_capacity_bytes': str(made.cache_capacity_bytes),
            'map_points': str(made.map_points),
            'map_version': str(made.map_version),
            **{name: str(number) for name, number in made.backend.items()},
            'frames_without_tf': str(made.frames_without_tf),
            'frames_without_scale': str(made.frames_without_scale),
            'scale': 'metric' if made.metres_per_unit else 'arbitrary',
            'tracking': made.tracking,
            'gaps': str(made.gaps),
            'restarts': str(sum(made.restarts.values())),
            **{f'restarts.{reason}': str(n) for reason, n in sorted(made.restarts.items())},
        }
        if made.metres_per_unit:
            values['metres_per_unit'] = f'{made.metres_per_unit:.4f}'
        if made.quality is not None:
            values['mean_confidence'] = f'{made.quality.confidence:.2f}'
            values['parallax'] = f'{made.quality.parallax:.4f}'
            values['turn_rad'] = f'{made.quality.turn:.4f}'
        if made.sigmas is not None:
            values['position_sigma'] = f'{made.sigmas.position:.4f}'
            values['rotation_sigma_rad'] = f'{made.sigmas.rotation:.4f}'
        if made.gpu_bytes is not None:
            values['gpu_bytes'] = str(made.gpu_bytes)
        return values


class FrameStatistics:
    """Counts images in and out and their latency, in bounded memory; safe between threads."""

    def __init__(self, window: int, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._arrivals: deque[float] = deque(maxlen=window)
        self._completions: deque[float] = deque(maxlen=window)
        self._latencies_s: deque[float] = deque(maxlen=window)
        self._num_received = self._num_processed = 0

    def received(self) -> float:
        """Note the arrival of an image and return its time, for :meth:`processed`."""
        now = self._clock()
        with self._lock:
            self._num_received += 1
            self._arrivals.append(now)
        return now

    def processed(self, arrival: float) -> None:
        """Note that the pose of the image that came at ``arrival`` has left (pictures follow)."""
        now = self._clock()
        with self._lock:
            self._num_processed += 1
            self._completions.append(now)
            self._latencies_s.append(now - arrival)

    def figures(self) -> FrameFigures:
        """Return the figures as of now."""
        now = self._clock()
        with self._lock:
            latencies_ms = 1e3 * np.array(self._latencies_s or [np.nan])
            p50, p95 = np.percentile(latencies_ms, [50, 95]).tolist()
            return FrameFigures(
                num_received=self._num_received,
                num_processed=self._num_processed,
                rate_in_hz=_rate_hz(self._arrivals, now),
                rate_out_hz=_rate_hz(self._completions, now),
                latency_p50_ms=p50,
                latency_p95_ms=p95,
            )


def diagnostic_array(
    status: NodeStatus, node_name: str, hardware_id: str, stamp
) -> DiagnosticArray:
    """Return the message for /diagnostics; ``stamp``: builtin_interfaces/Time."""
    entry = DiagnosticStatus(
        level=status.level,
        name=f'{node_name}: reconstruction',
        message=status.sentence(),
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=value) for key, value in status.values().items()],
    )
    message = DiagnosticArray(status=[entry])
    message.header.stamp = stamp
    return message


def _rate_hz(times: deque[float], now: float) -> float:
    recent = [t for t in times if t > now - RATE_WINDOW_S]
    return (len(recent) - 1) / max(now - recent[0], 1e-9) if len(recent) > 1 else 0.0


def _listed(drops: Mapping[str, int]) -> str:
    if not drops:
        return ''
    return ' (' + ', '.join(f'{n} {reason}' for reason, n in sorted(drops.items())) + ')'
