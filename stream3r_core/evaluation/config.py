"""Options of an evaluation; their dotted names serve the command line and YAML files."""

from dataclasses import dataclass

from stream3r_core.config import option
from stream3r_core.errors import ConfigError
from stream3r_core.evaluation.depth import ALIGNMENTS
from stream3r_core.evaluation.reconstruction import ICP_VARIANTS

MAX_GAP_S = 0.2  # between two transforms that true poses are interpolated from
EXPORTS = ('pcd', 'colmap', 'glb', 'rrd')


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and with which tolerances."""

    known_intrinsics: bool = option(
        False, "unproject with the input's intrinsics instead of the predicted field of view"
    )
    association_ms: float = option(
        10.0, 'poses of truth and estimate that lie this close in time are compared', minimum=0.0
    )
    truth_gap_s: float = option(
        MAX_GAP_S,
        'images whose neighbouring transforms on /tf lie farther apart have no true pose',
        minimum=0.0,
    )
    drift_segment_m: float = option(
        0.0, 'length of the path segments that drift is taken over; 0 = by the motion', minimum=0.0
    )
    depth_alignments: tuple[str, ...] = option(
        ('median', 'scale', 'lstsq', 'metric'),
        f'how predicted depth is brought to the truth, any of {", ".join(ALIGNMENTS)}',
    )
    max_depth_m: float = option(
        0.0, 'true depth beyond this is not judged; 0 = no limit', minimum=0.0
    )
    clip_depth_m: float = option(
        0.0, 'aligned prediction is clamped to this; 0 = not', minimum=0.0
    )
    depth_pixels: int = option(
        50_000_000, 'pixels kept for the common depth alignment', minimum=1000
    )
    exports: tuple[str, ...] = option(
        (), f'further files beside TUM, KITTI and PLY, any of {", ".join(EXPORTS)}'
    )
    pictures: bool = option(True, 'draw the pictures of report.html')
    depth_strips: int = option(4, 'frames shown as depth strips in the report', minimum=0)
    icp: str = option(
        'point_to_point',
        'registration before map metrics; the variants give different numbers',
        choices=tuple(ICP_VARIANTS),
    )
    icp_max_distance_m: float = option(0.1, 'farthest partner in the registration', minimum=1e-6)
    f_score_threshold_m: float = option(
        0.05, 'distance up to which a map point counts as right', minimum=1e-6
    )
    truth_voxel_m: float = option(0.02, 'voxel edge of the true map', minimum=1e-4)
    truth_points: int = option(2_000_000, 'point budget of the true map', minimum=1000)
    warm_up_frames: int = option(
        3, 'first frames that latency figures leave out, of runs longer than 10', minimum=0
    )

    def __post_init__(self):
        for name, known in (('depth_alignments', ALIGNMENTS), ('exports', EXPORTS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ConfigError(
                    f'evaluation.{name}: unknown {unknown[0]!r}; known: {", ".join(known)}'
                )
