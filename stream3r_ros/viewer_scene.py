"""Cloud, cameras and depth in a browser, by viser, an optional package."""

import logging

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from stream3r_core.errors import MissingDependencyError, OutputError

MAX_CAMERAS = 200  # axes along the path
_POINT_SHARE = 0.004  # of a point, of the extent of the map


class Scene:
    """What the browser shows; all poses and points in the map frame, z up, map units.

    Raises :class:`MissingDependencyError` without viser, :class:`OutputError` where it cannot
    serve. ``max_points`` bounds what is sent to the browser.
    """

    def __init__(self, host: str, port: int, max_points: int):
        self._max_points = max_points
        logging.getLogger('websockets.server').setLevel(logging.ERROR)
        self.server = _serve(host, port)
        self.server.scene.set_up_direction('+z')
        self._depth_image = None
        self._extent = 1.0
        self._is_aimed = False

    def set_map(self, points_xyz: np.ndarray, colors_rgb: np.ndarray) -> None:
        """Show a cloud [N, 3] with colours [N, 3] uint8, thinned evenly where it is too large."""
        if not len(points_xyz):
            return
        kept = np.linspace(0, len(points_xyz) - 1, min(len(points_xyz), self._max_points))
        points = points_xyz[kept.astype(int)].astype(np.float32)
        low, high = np.quantile(points, [0.02, 0.98], axis=0)
        self._extent = max(float(np.linalg.norm(high - low)), 1e-6)
        self.server.scene.add_point_cloud(
            '/map',
            points,
            colors_rgb[kept.astype(int)],
            point_size=_POINT_SHARE * self._extent,
            precision='float32',
        )
        self._aim((low + high) / 2)

    def set_path(self, T_map_camera: np.ndarray) -> None:
        """Show a path and its cameras, poses [N, 4, 4]; all of the path, some of its cameras."""
        if len(T_map_camera) > 1:
            positions = T_map_camera[:, :3, 3]
            self.server.scene.add_line_segments(
                '/path',
                np.stack([positions[:-1], positions[1:]], 1),
                colors=(40, 220, 60),
                thickness=0.003 * self._extent,
            )
        some = np.linspace(0, len(T_map_camera) - 1, min(len(T_map_camera), MAX_CAMERAS))
        shown = T_map_camera[some.astype(int)]
        self.server.scene.add_batched_axes(
            '/cameras',
            _wxyz(shown),
            shown[:, :3, 3],
            axes_length=0.02 * self._extent,
            axes_radius=0.001 * self._extent,
        )

    def set_view(self, T_map_camera: np.ndarray, K: np.ndarray, depth_m: np.ndarray) -> None:
        """Show the camera of one image, with its depth [H, W], NaN = none."""
        height, width = depth_m.shape
        picture = depth_colours(depth_m)
        self.server.scene.add_camera_frustum(
            '/camera',
            fov=2 * float(np.arctan(height / 2 / K[1, 1])),
            aspect=width / height,
            scale=0.08 * self._extent,
            image=picture,
            color=(240, 160, 20),
            wxyz=_wxyz(T_map_camera),
            position=T_map_camera[:3, 3],
        )
        if self._depth_image is None:
            self._depth_image = self.server.gui.add_image(picture, label='depth')
        self._depth_image.image = picture

    def _aim(self, middle: np.ndarray) -> None:
        """Let browsers that come look at the first map from the side and from above."""
        if not self._is_aimed:
            self.server.initial_camera.look_at = middle
            self.server.initial_camera.position = middle + self._extent * np.array(
                [-0.6, -0.6, 0.5]
            )
            self._is_aimed = True

    def close(self) -> None:
        """End the server."""
        self.server.stop()


def depth_colours(depth_m: np.ndarray) -> np.ndarray:
    """Return a picture [H, W, 3] uint8 of a depth image: near is red, far blue, none black."""
    known = np.isfinite(depth_m) & (depth_m > 0)
    if not known.any():
        return np.zeros((*depth_m.shape, 3), np.uint8)
    inverse = np.divide(1.0, depth_m, out=np.zeros(depth_m.shape), where=known)
    low, high = np.quantile(inverse[known], [0.02, 0.98])
    grey = np.clip((inverse - low) / max(high - low, 1e-9), 0, 1)
    colours = cv2.applyColorMap((255 * grey).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return np.where(known[..., None], colours, 0)


def _serve(host: str, port: int):
    try:
        import viser
    except ImportError as error:
        raise MissingDependencyError(
            f'the viewer needs viser, which cannot be imported ({error}); `pip install viser`'
        ) from error
    try:
        return viser.ViserServer(host, port, label='stream3r', verbose=False)
    except OSError as error:
        raise OutputError(
            f'cannot serve on {host}:{port}: {error}; choose another --port'
        ) from error


def _wxyz(T: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(T[..., :3, :3]).as_quat()[..., [3, 0, 1, 2]]
