"""One picture of what a run produced: image, depth, and the map from above and in perspective."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from stream3r_core.errors import InputError
from stream3r_core.evaluation.trajectory_files import read_trajectory
from stream3r_core.mapping import MapCloud, load_ply
from stream3r_ros.bag import BagReader
from stream3r_ros.conversions import depth_from_message, stamp_ns
from stream3r_ros.results import BAG, MAP, NAMESPACE, TRAJECTORY
from stream3r_ros.sources import Source

DEPTH_TOPIC = f'{NAMESPACE}/depth/image'
SHOWN_FRAME = 30  # or the last one of a shorter run
PANEL = 720  # pixels
ROBUST = (2, 98)  # percentiles of the points that decide what is in view
PATH_COLOR = '#e8112d'


def draw_results(
    folder: Path,
    source: Source,
    title: str,
    warning: str = '',
    true_xyz: np.ndarray | None = None,
) -> Path:
    """Draw ``picture.png`` from the files that a run over ``source`` left in ``folder``.

    ``warning`` is printed in red across the picture; ``true_xyz`` [N, 3], where the camera really
    was, in the map's frame and unit, is drawn beside the path. Raises :class:`DataError` where a
    file of the results is missing or unreadable.
    """
    path_xyz = read_trajectory(folder / TRAJECTORY).positions_m
    cloud = load_ply(folder / MAP)
    stamp, depth = _depth_of_one_frame(folder / BAG)
    figure = Figure(figsize=(12, 10.4), dpi=110, layout='constrained')
    axes = figure.subplots(2, 2)
    figure.suptitle(f'{title}: {len(path_xyz)} frames, {len(cloud):,} points')
    _show_image(axes[0, 0], _image_at(source, stamp))
    _show_depth(axes[0, 1], depth)
    views = {'from above': _from_above, 'in perspective': _from_behind}
    for axis, (name, view) in zip(axes[1], views.items()):
        _show_map(axis, cloud, path_xyz, view(cloud, path_xyz), f'map {name}', true_xyz)
    if warning:
        style = {'color': 'white', 'weight': 'bold', 'size': 15, 'ha': 'center', 'va': 'center'}
        figure.text(0.5, 0.51, warning, **style, bbox={'facecolor': 'crimson', 'pad': 8})
    figure.savefig(folder / 'picture.png')
    return folder / 'picture.png'


class View(NamedTuple):
    """A virtual camera whose panel holds what it was fitted to."""

    R_view_map: np.ndarray  # [3, 3], rows: right, down, forward
    eye_xyz: np.ndarray  # [3]
    is_perspective: bool
    centre: np.ndarray | float = 0.5  # [2], of the panel, before zooming
    zoom: float = 1.0

    def project(self, points_xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return panel coordinates [N, 2], 0 to 1 inside, and distances [N] along the view."""
        seen = (points_xyz - self.eye_xyz) @ self.R_view_map.T
        distance = seen[:, 2]
        divisor = np.where(distance > 0, distance, np.inf) if self.is_perspective else 1.0
        where = seen[:, :2] / np.expand_dims(divisor, -1)
        return 0.5 + (where - self.centre) * self.zoom, distance

    def fitted(self, cloud: MapCloud, path_xyz: np.ndarray) -> 'View':
        """Return the view moved and zoomed so that the panel holds nearly all points."""
        low, high = _bounds(*(self.project(xyz)[0] for xyz in (cloud.points_xyz, path_xyz)))
        # a default view projects to where - centre + 0.5, which is where
        return self._replace(centre=(low + high) / 2, zoom=0.92 / (high - low).max())


def _from_above(cloud: MapCloud, path_xyz: np.ndarray) -> View:
    R = np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, -1]])  # the map's x axis points up
    high = _bounds(cloud.points_xyz, path_xyz)[1]
    return View(R, high, is_perspective=False).fitted(cloud, path_xyz)


def _from_behind(cloud: MapCloud, path_xyz: np.ndarray) -> View:
    """Look from behind and above the first camera, which looks along the map's x axis."""
    low, high = _bounds(cloud.points_xyz, path_xyz)
    forward = np.array([0.75, 0.35, -0.56])
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    R = np.stack([right, np.cross(forward, right), forward])
    eye = (low + high) / 2 - 1.3 * np.linalg.norm(high - low) * forward
    return View(R, eye, is_perspective=True).fitted(cloud, path_xyz)


def _bounds(points: np.ndarray, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of what is to be seen: nearly all points and all of the path."""
    low, high = np.percentile(points if len(points) else path, ROBUST, axis=0)
    low, high = np.minimum(low, path.min(0)), np.maximum(high, path.max(0))
    return low, np.maximum(high, low + 1e-3)


def _show_map(
    axis,
    cloud: MapCloud,
    path_xyz: np.ndarray,
    view: View,
    title: str,
    true_xyz: np.ndarray | None,
) -> None:
    axis.imshow(_rendered(cloud, path_xyz, view), extent=(0, 1, 1, 0), interpolation='bilinear')
    x, y = view.project(path_xyz)[0].T
    axis.plot(x, y, color=PATH_COLOR, linewidth=2)
    axis.plot(x[:1], y[:1], 'o', color=PATH_COLOR, markeredgecolor='white', markersize=9)
    title += ', camera path in red'
    if true_xyz is not None:
        axis.plot(*view.project(true_xyz)[0].T, color='black', linewidth=1.2, linestyle='--')
        title += ', true path dashed'
    axis.set(title=title, xlim=(0, 1), ylim=(1, 0))
    axis.set_axis_off()


def _rendered(cloud: MapCloud, path_xyz: np.ndarray, view: View) -> np.ndarray:
    """Draw points from far to near, without what hangs above the camera: an open doll's house."""
    low, high = _bounds(cloud.points_xyz, path_xyz)
    ceiling = path_xyz[:, 2].max() + 0.15 * (high[2] - low[2])
    shown = cloud.points_xyz[:, 2] < ceiling
    where, distance = view.project(cloud.points_xyz[shown])
    far_to_near = np.argsort(-distance)
    corner = np.floor(where[far_to_near] * PANEL).astype(int)
    size = _point_size(len(cloud))
    square = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).reshape(-1, 2)
    x, y = (corner[:, None] + square).reshape(-1, 2).T
    colors = cloud.colors_rgb[shown][far_to_near].repeat(len(square), axis=0)
    inside = (x >= 0) & (x < PANEL) & (y >= 0) & (y < PANEL)
    panel = np.full((PANEL, PANEL, 3), 255, np.uint8)
    panel[y[inside], x[inside]] = colors[inside]  # of equal indices the last one stays
    return panel


def _point_size(num_points: int) -> int:
    """Return the side of a point in pixels, larger where points are few."""
    return int(np.clip(1.3 * PANEL / np.sqrt(max(num_points, 1)), 2, 8))


def _show_image(axis, rgb: np.ndarray | None) -> None:
    if rgb is not None:
        axis.imshow(rgb)
    axis.set(title='camera image' if rgb is not None else 'camera image (not in the input)')
    axis.set_axis_off()


def _show_depth(axis, depth: np.ndarray) -> None:
    near, far = np.nanpercentile(depth, ROBUST)
    shown = axis.imshow(depth, cmap='turbo', vmin=near, vmax=far)
    axis.figure.colorbar(shown, ax=axis, shrink=0.75, label='map units')
    axis.set(title='depth of that image')
    axis.set_axis_off()


def _depth_of_one_frame(bag: Path) -> tuple[int, np.ndarray]:
    with BagReader(bag) as reader:
        frames = itertools.islice(reader.messages([DEPTH_TOPIC]), SHOWN_FRAME)
        message = reader.deserialize(list(frames)[-1])
        return stamp_ns(message), depth_from_message(message)


def _image_at(source: Source, stamp: int) -> np.ndarray | None:
    for load in source:
        try:
            frame = load()
        except InputError:  # the run has reported it
            continue
        if frame.stamp_ns == stamp:
            return frame.rgb
    return None
