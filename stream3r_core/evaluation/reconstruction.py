"""Map metrics: accuracy, completeness, normal consistency, F-score (model.md section 21.6)."""

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from stream3r_core.errors import DataError, MissingDependencyError

ICP_VARIANTS = {
    'point_to_point': 'Open3D point-to-point, 30 iterations',
    'point_to_plane': 'Open3D point-to-plane on the true normals, 50 iterations',
    'none': 'no ICP and no normals',
}
ICP_MAX_POINTS = 1_000_000  # of either cloud; larger ones are thinned to a stated voxel grid
OPEN3D_REMEDY = (
    "pip install 'stream3r_ros[open3d]', and on a bare Debian "
    'apt install libusb-1.0-0 libgl1 libgomp1 libx11-6 libegl1'
)
SCALE_LIMITS = (1e-3, 1e3)  # of the published protocol


@dataclass(frozen=True)
class PointMapAlignment:
    """Prediction and truth after the published joint alignment, both in the world frame.

    ``scale`` multiplied the prediction around (0, 0, ``prediction_shift_z``) of the anchor camera,
    which then moved to z = ``truth_shift_z_m``.
    """

    prediction: Tensor  # [S, H, W, 3], metres, world
    truth: Tensor  # [S, H, W, 3], metres, world
    scale: float
    prediction_shift_z: float
    truth_shift_z_m: float


def align_point_maps(
    prediction: Tensor, truth_world: Tensor, valid: Tensor, T_world_anchor: Tensor
) -> PointMapAlignment:
    """Bring predicted point maps to the truth with one depth shift and one scale for all frames.

    ``prediction`` [S, H, W, 3] in the anchor camera's frame, any scale; ``truth_world``
    [S, H, W, 3] metres; ``valid`` [S, H, W] bool; ``T_world_anchor`` [4, 4] true pose of frame 0.
    Medians of z are subtracted, the scale is the ratio of the median distances to the per-axis
    median. Raises DataError when nothing is valid.
    """
    if not valid.any():
        raise DataError('no pixel has both a true and a predicted point; check the depth files')
    anchor = T_world_anchor.double()
    truth = _transform(torch.linalg.inv(anchor), truth_world)
    z_truth, z_prediction = (x[..., 2][valid].median() for x in (truth, prediction))
    shifted = prediction - prediction.new_tensor([0, 0, 1]) * z_prediction
    scale_truth, scale_prediction = _median_radius(truth[valid]), _median_radius(shifted[valid])
    scale = scale_truth / min(max(scale_prediction, SCALE_LIMITS[0]), SCALE_LIMITS[1])
    placed = shifted * scale + truth.new_tensor([0, 0, 1]) * z_truth
    return PointMapAlignment(
        _transform(anchor, placed), truth_world, scale, z_prediction.item(), z_truth.item()
    )


def _median_radius(points: Tensor) -> float:
    centre = points.median(dim=0).values
    return (points - centre).norm(dim=1).median().item()


def _transform(T: Tensor, points: Tensor) -> Tensor:
    return (points.double() @ T[:3, :3].T + T[:3, 3]).to(points.dtype)


def centre_crop(maps: Tensor, side: int = 224) -> Tensor:
    """Central ``side`` x ``side`` pixels of maps [S, H, W, ...], or all where they are smaller."""
    height, width = maps.shape[1:3]
    top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
    return maps[:, top : top + side, left : left + side]


@dataclass(frozen=True)
class CloudErrors:
    """Distances between a predicted and a true cloud, metres; normals where they were given."""

    accuracy_m: np.ndarray  # [N] predicted point -> nearest true point
    completeness_m: np.ndarray  # [M] true point -> nearest predicted point
    normal_consistency_accuracy: np.ndarray | None  # [N] |cosine| of the normals of these pairs
    normal_consistency_completeness: np.ndarray | None  # [M]
    threshold_m: float  # of precision, recall and F-score

    @cached_property
    def summary(self) -> dict[str, float]:
        """Metric name -> value; names end in their unit where they have one."""
        precision = float((self.accuracy_m < self.threshold_m).mean())
        recall = float((self.completeness_m < self.threshold_m).mean())
        both = precision + recall
        return {
            'accuracy_mean_m': float(self.accuracy_m.mean()),
            'accuracy_median_m': float(np.median(self.accuracy_m)),
            'completeness_mean_m': float(self.completeness_m.mean()),
            'completeness_median_m': float(np.median(self.completeness_m)),
            **self._normal_summary(),
            'f_score': 2 * precision * recall / both if both else 0.0,
            'precision': precision,
            'recall': recall,
        }

    def _normal_summary(self) -> dict[str, float]:
        if self.normal_consistency_accuracy is None:
            return {}
        sides = (self.normal_consistency_accuracy, self.normal_consistency_completeness)
        nc1, nc2 = (float(side.mean()) for side in sides)
        nc1_median, nc2_median = (float(np.median(side)) for side in sides)
        return {
            'normal_consistency_1': nc1,
            'normal_consistency_2': nc2,
            'normal_consistency': (nc1 + nc2) / 2,
            'normal_consistency_1_median': nc1_median,
            'normal_consistency_2_median': nc2_median,
            'normal_consistency_median': (nc1_median + nc2_median) / 2,
        }


def cloud_errors(
    prediction: np.ndarray,
    truth: np.ndarray,
    prediction_normals: np.ndarray | None = None,
    truth_normals: np.ndarray | None = None,
    threshold_m: float = 0.05,
) -> CloudErrors:
    """Nearest-neighbour metrics between clouds [N, 3] and [M, 3], metres, in one frame.

    Normals [N, 3] and [M, 3] have unit length and any sign. Raises DataError for clouds that are
    empty or not finite.
    """
    prediction, truth = _cloud(prediction, 'predicted'), _cloud(truth, 'true')
    accuracy, nearest_truth = _nearest(prediction, truth)
    completeness, nearest_prediction = _nearest(truth, prediction)
    nc1 = nc2 = None
    if prediction_normals is not None and truth_normals is not None:
        nc1 = np.abs((prediction_normals * truth_normals[nearest_truth]).sum(axis=1))
        nc2 = np.abs((truth_normals * prediction_normals[nearest_prediction]).sum(axis=1))
    return CloudErrors(accuracy, completeness, nc1, nc2, threshold_m)


def _cloud(points: np.ndarray, name: str) -> np.ndarray:
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points):
        raise DataError(
            f'the {name} cloud must hold points [N >= 1, 3], got {points.shape}; an empty one '
            'means that no depth or no confident point was found'
        )
    if not np.isfinite(points).all():
        raise DataError(f'the {name} cloud holds points that are not finite; remove them first')
    return points


def _nearest(points: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and index of the nearest of ``of`` [M, 3] for each of ``points`` [N, 3]."""
    tree = cKDTree(of)
    order = _coherent_order(points)  # neighbours in a row share the tree's pages: 3 times faster
    distances, indices = np.empty(len(points)), np.empty(len(points), dtype=np.int64)
    distances[order], indices[order] = tree.query(points[order], workers=-1)
    return distances, indices


def _coherent_order(points: np.ndarray) -> np.ndarray:
    """Indices that visit the points cell by cell of a coarse grid."""
    low, span = points.min(axis=0), np.ptp(points, axis=0).max() or 1.0
    cells = ((points - low) / span * 63).astype(np.int64)
    return np.argsort((cells[:, 0] << 12) + (cells[:, 1] << 6) + cells[:, 2], kind='stable')


@dataclass(frozen=True)
class Icp:
    """Result of an ICP that moved a predicted cloud onto the true one."""

    variant: str
    T_truth_prediction: np.ndarray  # [4, 4]
    fitness: float  # share of the predicted points with a partner
    inlier_rmse_m: float
    max_distance_m: float
    voxel_m: float  # both clouds were thinned to this grid; 0 = all points took part
    num_points: tuple[int, int]  # predicted and true points that took part
    duration_s: float


def icp(
    prediction: np.ndarray,
    truth: np.ndarray,
    variant: str = 'point_to_point',
    max_distance_m: float = 0.1,
    max_points: int = ICP_MAX_POINTS,
) -> Icp:
    """Register ``prediction`` [N, 3] to ``truth`` [M, 3] with Open3D, starting at the identity.

    The variants give different numbers; results must name theirs. Clouds of more than
    ``max_points`` are thinned to the voxel grid stated in the result.
    Raises MissingDependencyError without Open3D.
    """
    if variant not in ICP_VARIANTS:
        raise DataError(f'unknown ICP variant {variant!r}; known: {", ".join(ICP_VARIANTS)}')
    clouds = _cloud(prediction, 'predicted'), _cloud(truth, 'true')
    if variant == 'none':
        return Icp('none', np.eye(4), 0.0, 0.0, max_distance_m, 0.0, (0, 0), 0.0)
    registration = open3d().pipelines.registration
    started = time.perf_counter()
    source, target, voxel_m = _thinned(*(_to_open3d(c) for c in clouds), max_points)
    if variant == 'point_to_plane':
        target.estimate_normals()
        method, iterations = registration.TransformationEstimationPointToPlane(), 50
    else:
        method, iterations = registration.TransformationEstimationPointToPoint(), 30
    result = registration.registration_icp(
        source,
        target,
        max_distance_m,
        np.eye(4),
        method,
        registration.ICPConvergenceCriteria(max_iteration=iterations),
    )
    return Icp(
        variant,
        np.asarray(result.transformation),
        result.fitness,
        result.inlier_rmse,
        max_distance_m,
        voxel_m,
        (len(source.points), len(target.points)),
        time.perf_counter() - started,
    )


def estimate_normals(points: np.ndarray) -> np.ndarray:
    """Unit normals [N, 3] of a cloud by Open3D's defaults (30 neighbours); their sign is open."""
    cloud = _to_open3d(_cloud(points, 'given'))
    cloud.estimate_normals()
    return np.asarray(cloud.normals)


def open3d():
    """Return the Open3D module, or raise MissingDependencyError with the remedy."""
    try:
        import open3d as module
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f'ICP and normals need Open3D, which cannot be imported ({error}): {OPEN3D_REMEDY}'
        ) from error
    return module


def _to_open3d(points: np.ndarray):
    o3d = open3d()
    return o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points.astype(np.float64)))


def _thinned(source, target, max_points: int):
    """Both clouds on the first voxel grid, of doubling size, that leaves ``max_points``."""
    voxel_m = 0.0
    extent = float(np.max(target.get_max_bound() - target.get_min_bound())) or 1.0
    while max(len(source.points), len(target.points)) > max_points:
        voxel_m = voxel_m * 2 if voxel_m else extent / 1024
        source, target = (cloud.voxel_down_sample(voxel_m) for cloud in (source, target))
    return source, target, voxel_m


@dataclass(frozen=True)
class MapErrors:
    """Cloud errors after ICP, with everything that a reader needs to compare them."""

    errors: CloudErrors
    icp: Icp
    prediction: np.ndarray  # [N, 3] registered
    truth: np.ndarray  # [M, 3]


def map_errors(
    prediction: np.ndarray,
    truth: np.ndarray,
    variant: str = 'point_to_point',
    max_distance_m: float = 0.1,
    threshold_m: float = 0.05,
) -> MapErrors:
    """Published map metrics: ICP of ``prediction`` to ``truth``, normals, nearest neighbours.

    Raises MissingDependencyError without Open3D, but for variant 'none', which leaves out
    registration and normals.
    """
    registration = icp(prediction, truth, variant, max_distance_m)
    T = registration.T_truth_prediction
    registered = prediction @ T[:3, :3].T + T[:3, 3]
    normals = () if variant == 'none' else map(estimate_normals, (registered, truth))
    errors = cloud_errors(registered, truth, *normals, threshold_m=threshold_m)
    return MapErrors(errors, registration, registered, truth)
