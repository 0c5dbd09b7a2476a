"""The pictures of a report, as PNG: matplotlib figures without any global state."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stream3r_core.evaluation.depth import DepthErrors
from stream3r_core.evaluation.frame_log import FrameLog
from stream3r_core.evaluation.reconstruction import MapErrors
from stream3r_core.evaluation.trajectory import TrajectoryError
from stream3r_core.mapping import MapCloud

MAX_DRAWN_POINTS = 150_000
DPI = 110
STRIP_INCHES = 2.6  # width of one image of the depth strips
NAMES = {'se3': 'SE(3)', 'sim3': 'Sim(3)'}
COLORS = {'se3': 'tab:blue', 'sim3': 'tab:orange'}


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Strip:
    """One frame for the depth strips."""

    name: str
    image_rgb: np.ndarray  # [H, W, 3] uint8
    truth_m: np.ndarray  # [h, w], 0 = invalid
    prediction: np.ndarray  # [h, w], not aligned, NaN = unknown


@dataclass(frozen=True)
class View:
    """World axes along a picture; ``is_down``: the vertical one is drawn downwards."""

    horizontal: int
    vertical: int
    is_down: bool

    def orient(self, axis, unit: str = 'm') -> None:
        """Label the axes of a plot, and turn it the right way up."""
        names = ('xyz'[i] for i in (self.horizontal, self.vertical))
        axis.set(**{f'{side}label': f'{name} ({unit})' for side, name in zip('xy', names)})
        axis.yaxis.set_inverted(self.is_down)


def _canvas(rows: int, columns: int, width: float, height: float, **options):
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _finished(figure, caption: str) -> Figure:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=DPI, metadata={'Software': None})
    return Figure(caption, buffer.getvalue())


def trajectory(ates: dict[str, TrajectoryError]) -> Figure:
    """Estimates over the truth from above and from the side."""
    figure, axes = _canvas(1, 2, 11, 5)
    truth = next(iter(ates.values())).truth
    titles = 'from above', 'from the side'
    for axis, view, title in zip(axes[0], views(truth.T_world_camera), titles):
        paths = {'truth': (truth, 'black')}
        paths |= {NAMES[a]: (e.estimate, COLORS[a]) for a, e in ates.items()}
        for label, (path, color) in paths.items():
            across, along = path.positions_m[:, [view.horizontal, view.vertical]].T
            axis.plot(across, along, color=color, label=label, linewidth=1.3)
            axis.plot(across[0], along[0], 'o', color=color, markersize=4)
        axis.set_title(title)
        view.orient(axis)
        axis.set_aspect('equal', 'datalim')
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return _finished(figure, f'Estimate over the truth ({truth.name}); the dot is the start.')


def views(T_world_camera: np.ndarray) -> tuple[View, View]:
    """Return the views from above and from the side.

    Down is the direction of a world axis that the cameras' own vertical is closest to on average.
    """
    down = T_world_camera[:, :3, 1].mean(axis=0)
    vertical = int(np.abs(down).argmax())
    first, second = (axis for axis in range(3) if axis != vertical)
    extent = np.ptp(T_world_camera[:, :3, 3], axis=0)
    longest = max(first, second, key=lambda axis: extent[axis])
    is_down = bool(down[vertical] > 0)
    # Who looks down at x, y has z coming up to the eye; at x, z it is y that goes away from it.
    return View(first, second, is_down != (vertical == 1)), View(longest, vertical, is_down)


def error_over_time(ates: dict[str, TrajectoryError]) -> Figure:
    """Distance to the truth of every pose."""
    figure, axes = _canvas(1, 1, 11, 3)
    for alignment, error in ates.items():
        label = f'{NAMES[alignment]}, RMSE {error.rmse:.3g} m'
        seconds = _seconds(error.truth.stamps_ns, len(error.errors))
        axes[0, 0].plot(seconds, error.errors, label=label, color=COLORS[alignment])
    unit = 's' if error.truth.stamps_ns is not None else 'frames'
    axes[0, 0].set(xlabel=f'time ({unit})', ylabel='position error (m)', ylim=(0, None))
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend()
    return _finished(figure, f'Absolute error along time, against {error.truth.name}.')


def _seconds(stamps_ns: Sequence[int] | None, number: int) -> np.ndarray:
    if stamps_ns is None:
        return np.arange(number)
    stamps = np.asarray(stamps_ns)
    return (stamps - stamps[0]) * 1e-9


def depth_strips(strips: list[Strip], errors: DepthErrors) -> Figure:
    """Image, true depth, aligned prediction and relative error of some frames."""
    aspects = [strip.image_rgb.shape[0] / strip.image_rgb.shape[1] for strip in strips]
    height = 0.5 + STRIP_INCHES * sum(aspects)
    figure, axes = _canvas(len(strips), 4, 12, height, height_ratios=aspects)
    for row, strip in zip(axes, strips):
        truth, aligned, error = strip_maps(strip, errors)
        near, far = np.nanpercentile(truth, (2, 98)) if np.isfinite(truth).any() else (0, 1)
        row[0].imshow(strip.image_rgb)
        row[0].set_ylabel(strip.name, fontsize=7)
        shown = [
            row[1].imshow(truth, vmin=near, vmax=far, cmap='turbo'),
            row[2].imshow(aligned, vmin=near, vmax=far, cmap='turbo'),
            row[3].imshow(error, vmin=0, vmax=0.5, cmap='magma'),
        ]
        figure.colorbar(shown[1], ax=row[1:3].tolist(), shrink=0.8, label='m')
        figure.colorbar(shown[2], ax=row[3], shrink=0.8)
    for axis, title in zip(axes[0], ('image', 'true depth', 'prediction', '|error| / truth')):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return _finished(figure, f'Depth, alignment "{errors.alignment}" over the whole input.')


def strip_maps(strip: Strip, errors: DepthErrors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True depth and aligned prediction in metres, and the relative error, each [h, w].

    NaN where there is no truth (not in the prediction) or no prediction (not in the truth).
    """
    truth = np.where(strip.truth_m > 0, strip.truth_m, np.nan)
    aligned = strip.prediction * errors.scale + errors.shift_m
    return truth, aligned, np.abs(aligned - truth) / truth


def depth_over_time(stamps_ns: list[int], abs_rel: np.ndarray, errors: DepthErrors) -> Figure:
    """Relative depth error of every frame under the common alignment."""
    figure, axes = _canvas(1, 1, 11, 2.6)
    axes[0, 0].plot(_seconds(stamps_ns, len(abs_rel)), abs_rel, color='tab:green')
    axes[0, 0].set(xlabel='time (s)', ylabel='AbsRel', ylim=(0, None))
    axes[0, 0].grid(alpha=0.3)
    return _finished(
        figure, f'Depth error along time, one "{errors.alignment}" alignment for all.'
    )


def map_errors(result: MapErrors, T_world_camera: np.ndarray) -> Figure:
    """Predicted map coloured by accuracy and true map by completeness.

    Seen as one of the views of the true cameras, that in which the true map is larger.
    """
    figure, axes = _canvas(1, 2, 12, 5.2)
    worst = 3 * result.errors.threshold_m
    parts = (
        (result.prediction, result.errors.accuracy_m, 'predicted map: accuracy'),
        (result.truth, result.errors.completeness_m, 'true map: completeness'),
    )
    extent = np.ptp(result.truth, axis=0)
    top, side = views(T_world_camera)
    area_m2 = {v: extent[v.horizontal] * extent[v.vertical] for v in (top, side)}
    view = max(area_m2, key=area_m2.get)
    low, high = map_limits(result.truth, result.prediction)
    for axis, (points, errors, title) in zip(axes[0], parts):
        drawn = slice(None, None, max(1, len(points) // MAX_DRAWN_POINTS))
        dots = axis.scatter(
            points[drawn, view.horizontal],
            points[drawn, view.vertical],
            c=errors[drawn],
            s=dot_size(len(points)),
            vmin=0,
            vmax=worst,
            cmap='viridis_r',
            linewidths=0,
            rasterized=True,
        )
        axis.set(
            title=title,
            xlim=(low[view.horizontal], high[view.horizontal]),
            ylim=(low[view.vertical], high[view.vertical]),
        )
        view.orient(axis)
        axis.set_aspect('equal')
    figure.colorbar(dots, ax=axes[0].tolist(), label='distance to the nearest point (m)')
    return _finished(figure, f'Map errors, seen from {"above" if view is top else "the side"}.')


def map_limits(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner [3] of what is drawn: the true map with a margin.

    Where most of the predicted points lie outside of that, it is widened to hold them.
    """
    low, high = np.percentile(truth, (0.5, 99.5), axis=0)
    margin = 0.15 * (high - low)
    low, high = low - margin, high + margin
    inside = ((prediction >= low) & (prediction <= high)).all(axis=1)
    if inside.mean() < 0.5:
        corners = np.percentile(prediction, (2, 98), axis=0)
        low, high = np.minimum(low, corners[0]), np.maximum(high, corners[1])
    return low, high


def predicted_map(cloud: MapCloud) -> Figure:
    """The predicted map in its own colours, from the first camera and from above."""
    figure, axes = _canvas(1, 2, 11, 5)
    drawn = slice(None, None, max(1, len(cloud) // MAX_DRAWN_POINTS))
    points, colors = cloud.points_xyz[drawn], cloud.colors_rgb[drawn] / 255
    low, high = np.percentile(points, (1, 99), axis=0)
    titles = 'from the first camera', 'from above'
    for axis, view, title in zip(axes[0], (View(0, 1, True), View(0, 2, False)), titles):
        first, second = view.horizontal, view.vertical
        axis.scatter(
            points[:, first], points[:, second], c=colors, s=dot_size(len(points)), linewidths=0
        )
        axis.set(title=title, xlim=(low[first], high[first]), ylim=(low[second], high[second]))
        view.orient(axis, 'map units')
        axis.set_aspect('equal')
    return _finished(figure, 'The predicted map in the frame of the first camera.')


def dot_size(count: int) -> float:
    """Area of a dot, points^2, so that few points are seen and many do not run together."""
    return float(np.clip(20_000 / max(count, 1), 0.4, 12.0))


def speed(log: FrameLog) -> Figure:
    """Latency and memory of every frame."""
    figure, axes = _canvas(1, 2, 11, 3)
    frames = np.arange(len(log))
    axes[0, 0].plot(frames, log.latency_ms, linewidth=0.9)
    axes[0, 0].set(xlabel='frame', ylabel='latency (ms)', ylim=(0, None))
    memory = {'cache': log.cache_bytes, 'process': log.process_bytes, 'GPU': log.gpu_bytes}
    for label, values in memory.items():
        if None not in values:
            axes[0, 1].plot(frames, np.array(values) / 2**20, label=label)
    axes[0, 1].set(xlabel='frame', ylabel='memory (MiB)', yscale='symlog', ylim=(0, None))
    axes[0, 1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return _finished(figure, 'Latency and memory over frames.')


def scatter(
    labels: Sequence[tuple[str, str]], panels: Sequence[dict[str, tuple[float, float]]]
) -> Figure:
    """Named points, two panels in a row; ``labels`` are those of the axes of each panel."""
    figure, axes = _canvas((len(panels) + 1) // 2, 2, 11, 4 * ((len(panels) + 1) // 2))
    for axis, (x_label, y_label), points in zip(axes.flat, labels, panels):
        for name, (x, y) in points.items():
            axis.plot(x, y, 'o', label=name, alpha=0.8)
        right, top = (1.3 * max(values) or 1.0 for values in zip(*points.values()))
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(0, right), ylim=(0, top))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    axes[0, 0].legend()
    return _finished(figure, 'Quality against cost; left and low is good.')
