"""Options of the back end; frozen dataclasses in the style of :mod:`stream3r_core.config`."""

from dataclasses import dataclass, field

from stream3r_core.options import option


@dataclass(frozen=True)
class KeyframeConfig:
    """Which frames are remembered of those that the session has tracked; all give points."""

    max_overlap: float = option(
        0.85,
        'a frame that sees less than this share of the last keyframe is one itself',
        minimum=0.0,
        maximum=1.0,
    )
    min_parallax: float = option(
        0.08,
        'camera motion, as a fraction of the median depth, that makes a keyframe',
        minimum=0.0,
    )
    min_rotation_deg: float = option(12.0, 'rotation that makes a keyframe', minimum=0.0)
    min_confidence: float = option(
        1.2, 'frames whose median confidence (1 = none) is lower are passed over', minimum=1.0
    )
    grid_side: int = option(
        48, 'longer side of the depth grid that a keyframe keeps', minimum=8, maximum=518
    )
    keep_images: bool = option(True, 'keep the network image for the verification of loops')


@dataclass(frozen=True)
class SubmapConfig:
    """When a session restarts, and what a map may hold."""

    max_frames: int = option(60, 'frames after which a new submap starts', minimum=2)
    overlap: int = option(3, 'frames that two consecutive submaps share', minimum=1)
    max_gap_s: float = option(1.5, 'pause after which a new submap starts', minimum=0.0)
    min_quality: float = option(
        0.4,
        'a new submap starts where confidence - 1 falls below this fraction of its median',
        minimum=0.0,
        maximum=1.0,
    )
    max_submaps: int = option(1000, 'beyond, neighbours are folded into each other', minimum=2)
    max_points: int = option(
        2_000_000, 'points of all submaps; older ones are coarsened', minimum=1
    )
    max_submap_points: int = option(100_000, 'points of one submap', minimum=1)
    max_keyframes: int = option(5000, 'keyframes of all submaps', minimum=2)
    max_images: int = option(
        500, 'keyframes that keep their image; others are no longer recognised', minimum=0
    )
    max_poses: int = option(
        50_000, 'frame poses of all submaps; the older half is thinned evenly', minimum=2
    )


@dataclass(frozen=True)
class DriftConfig:
    """What a session errs by over one submap, one standard deviation."""

    rotation_deg: float = option(0.5, 'rotation', minimum=1e-6)
    translation: float = option(0.01, 'translation, as a fraction of the path', minimum=1e-9)
    scale: float = option(0.02, 'scale', minimum=1e-9)


@dataclass(frozen=True)
class AlignmentConfig:
    """How a submap is joined to the one before."""

    min_confidence: float = option(1.0, 'pixels below are not used', minimum=1.0)
    min_pixels: int = option(30, 'shared pixels needed', minimum=3)
    min_inliers: float = option(
        0.4, 'share of pixels that must agree on one scale', minimum=0.0, maximum=1.0
    )
    depth_tolerance: float = option(
        0.1, 'deviation of a depth ratio up to which a pixel agrees', minimum=1e-6
    )
    iterations: int = option(8, 'rounds of robust refinement', minimum=1)
    min_parallax: float = option(
        0.01, 'motion over depth below which a submap counts as pure rotation', minimum=0.0
    )
    min_relief: float = option(
        0.02, 'thickness over extent below which the shared points count as a plane', minimum=0.0
    )
    lost_rotation_deg: float = option(20.0, 'uncertainty without overlap: rotation', minimum=1e-6)
    lost_translation: float = option(
        1.0, 'uncertainty without overlap: translation, in median depths', minimum=1e-6
    )
    lost_scale: float = option(0.5, 'uncertainty without overlap: scale', minimum=1e-6)


@dataclass(frozen=True)
class PlaceConfig:
    """Search for places seen before."""

    min_similarity: float = option(
        0.5,
        'cosine of two descriptors of one place, without the mean of all keyframes',
        minimum=-1.0,
        maximum=1.0,
    )
    ratio: float = option(
        1.0,
        'similarity over that of the nearest other place must exceed this; <= 1 = no ratio test',
        minimum=0.0,
    )
    exclude_submaps: int = option(2, 'submaps just before that are no revisit', minimum=1)
    max_candidates: int = option(3, 'places proposed per keyframe', minimum=1)
    brute_force_below: int = option(
        20_000, 'up to so many keyframes all are compared; above faiss searches', minimum=1
    )


@dataclass(frozen=True)
class LoopConfig:
    """What a proposed revisit must show before it may move the map."""

    min_confidence: float = option(1.2, 'median confidence of the pair', minimum=1.0)
    min_covisible: float = option(
        0.25, 'share of either image that the other sees', minimum=0.0, maximum=1.0
    )
    min_consistent: float = option(
        0.6, 'share of covisible pixels whose depths agree', minimum=0.0, maximum=1.0
    )
    depth_tolerance: float = option(0.1, 'difference of depths that agree', minimum=1e-6)
    rotation_deg: float = option(0.5, 'uncertainty of a verified pair: rotation', minimum=1e-6)
    translation: float = option(
        0.02, 'uncertainty of a verified pair: translation, in median depths', minimum=1e-9
    )
    scale: float = option(0.02, 'uncertainty of a verified pair: scale', minimum=1e-9)
    neighbours: int = option(
        3, 'submaps up to which another loop counts as a neighbour that can agree', minimum=0
    )
    min_support: int = option(1, 'neighbouring loops that must agree', minimum=0)
    max_per_pair: int = option(3, 'loops looked for between the same two submaps', minimum=1)
    max_pending: int = option(200, 'loops that wait for support', minimum=1)


@dataclass(frozen=True)
class GraphConfig:
    """The pose graph."""

    relinearise: float = option(0.05, 'change that makes iSAM2 linearise anew', minimum=1e-6)
    max_iterations: int = option(2, 'steps per update; the next update goes on', minimum=1)
    inflation: float = option(
        2.0, 'factor by which drift may exceed its model before a loop is doubted', minimum=1.0
    )
    consensus: int = option(
        3,
        'submaps whose loops must agree to be believed though drift does not explain them; 0 = '
        'never',
        minimum=0,
    )
    max_drift_factor: float = option(
        50.0, 'factor by which drift may be found to exceed its model', minimum=1.0
    )
    kernel: float = option(
        3.0, 'Cauchy kernel of loops and metric scales, standard deviations', minimum=0.1
    )
    max_loops: int = option(5000, 'loops kept; the oldest go first', minimum=1)
    max_dormant: int = option(100, 'doubted loops that are tried again', minimum=0)
    scale_sigma: float = option(0.02, 'uncertainty of a metric scale', minimum=1e-6)
    gravity_deg: float = option(2.0, 'uncertainty of a gravity direction', minimum=1e-6)


@dataclass(frozen=True)
class SensorConfig:
    """What else the graph is told, where the node has it."""

    odometry: bool = option(
        True, 'the odometry of odom_frame, if there is one, holds submaps together, in metres'
    )
    scale: bool = option(True, 'the metres of scale.source, if there is one, scale each submap')
    gravity: bool = option(
        False, 'the odometry of odom_frame, whose z is up, keeps submaps level with the first one'
    )
    odometry_translation: float = option(
        0.02, 'uncertainty of the odometry over a submap, as a fraction of its way', minimum=1e-6
    )
    odometry_rotation_deg: float = option(
        1.0, 'uncertainty of the odometry over a submap: rotation', minimum=1e-6
    )
    min_ratios: int = option(5, 'frames of a submap that tell its metric scale', minimum=1)


@dataclass(frozen=True)
class BackendConfig:
    """Everything that the back end reads."""

    kind: str = option(
        'none',
        "'none': one session, whose drift stays; 'submaps': sessions restart into submaps, "
        'revisits are recognised and close loops, and the map moves with its poses',
        choices=('none', 'submaps'),
    )
    load: str = option('', 'saved map to go on in (.safetensors); empty = begin a new one')
    localize_only: bool = option(
        False,
        'tell where the camera is in the map of backend.load, which stays as it is; one without '
        'metres is scaled by scale.source on its way out',
    )
    keyframes: KeyframeConfig = field(default_factory=KeyframeConfig)
    submaps: SubmapConfig = field(default_factory=SubmapConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    places: PlaceConfig = field(default_factory=PlaceConfig)
    loops: LoopConfig = field(default_factory=LoopConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    sensors: SensorConfig = field(default_factory=SensorConfig)
