"""The node's configuration: the core's tree plus what only a ROS node has.

No ROS in here. The dotted names of the leaves are the names of the ROS parameters.
"""

from dataclasses import dataclass, field

from stream3r_core.config import CoreConfig, OccupancyConfig, option


@dataclass(frozen=True)
class OutputConfig:
    """One published topic."""

    enabled: bool = option(True, 'publish this topic', live=True)
    max_rate_hz: float = option(
        0.0,
        'at most this many messages per second of image stamps; 0 = one per frame',
        minimum=0.0,
        live=True,
    )


@dataclass(frozen=True)
class PathOutputConfig(OutputConfig):
    """The path: all poses since the session began, thinned to a bound."""

    max_rate_hz: float = option(
        2.0,
        'at most this many messages per second of image stamps; 0 = one per frame',
        minimum=0.0,
        live=True,
    )
    max_poses: int = option(1000, 'poses in a path message: the most recent ones', minimum=1)


@dataclass(frozen=True)
class MapOutputConfig:
    """The accumulated map."""

    enabled: bool = option(True, 'publish this topic', live=True)
    period_s: float = option(
        2.0, 'seconds between two messages while the map changes', minimum=0.05, maximum=3600.0
    )


@dataclass(frozen=True)
class MapChangesOutputConfig:
    """The voxels that have changed, for subscribers that keep a map of their own."""

    enabled: bool = option(True, 'publish this topic', live=True)
    period_s: float = option(
        0.5, 'seconds between two looks for changes', minimum=0.05, maximum=3600.0
    )
    max_points: int = option(
        30_000,
        'voxels per message of 32 bytes each; more changes take more messages',
        minimum=1,
        maximum=1_000_000,
        live=True,
    )


@dataclass(frozen=True)
class OccupancyOutputConfig(OccupancyConfig):
    """A 2-D grid for navigation, made only while somebody listens."""

    enabled: bool = option(False, 'publish this topic', live=True)
    period_s: float = option(
        2.0, 'seconds between two messages while the map changes', minimum=0.05, maximum=3600.0
    )


@dataclass(frozen=True)
class OutputsConfig:
    """What leaves the node beside TF; each topic has its own switch and rate."""

    pose: OutputConfig = field(default_factory=OutputConfig)
    path: PathOutputConfig = field(default_factory=PathOutputConfig)
    odometry: OutputConfig = field(default_factory=OutputConfig)
    depth: OutputConfig = field(default_factory=OutputConfig)
    confidence: OutputConfig = field(default_factory=OutputConfig)
    depth_sigma: OutputConfig = field(default_factory=OutputConfig)
    cloud: OutputConfig = field(default_factory=OutputConfig)
    map: MapOutputConfig = field(default_factory=MapOutputConfig)
    map_changes: MapChangesOutputConfig = field(default_factory=MapChangesOutputConfig)
    occupancy_grid: OccupancyOutputConfig = field(default_factory=OccupancyOutputConfig)


@dataclass(frozen=True)
class SaveMapConfig:
    """Where and what ``~/save_map`` writes."""

    directory: str = option('', 'folder that ~/save_map writes into; empty = the service refuses')
    map_name: str = option('map', 'map file, without its ending', live=True)
    trajectory_name: str = option('trajectory', 'trajectory file, without its ending', live=True)
    ply: bool = option(True, 'write the map as PLY', live=True)
    pcd: bool = option(False, 'write the map as PCD', live=True)
    tum: bool = option(True, 'write the trajectory in the TUM format', live=True)
    on_exit: bool = option(False, 'save also when the node ends, on a signal say')
    max_poses: int = option(
        200_000, 'poses kept for the trajectory; beyond it the oldest are forgotten', minimum=1
    )


@dataclass(frozen=True)
class TrackingConfig:
    """When poses are to be doubted: state OK, DEGRADED or LOST on /diagnostics."""

    min_confidence: float = option(
        0.0,
        'mean confidence of an image (1 = none) below which tracking is DEGRADED; 0 = as fitted '
        'to the weights, else 1.5',
        minimum=0.0,
        live=True,
    )
    lost_confidence: float = option(
        0.0,
        'mean confidence below which an image counts as lost; 0 = as fitted to the weights, else '
        '1.1',
        minimum=0.0,
        live=True,
    )
    max_parallax: float = option(
        0.2,
        'motion between two images, over the median depth, above which a pose has jumped',
        minimum=0.0,
        live=True,
    )
    max_turn: float = option(
        0.35, 'rad between two images above which a pose has jumped', minimum=0.0, live=True
    )
    patience: int = option(
        5, 'images in a row that make LOST, or bring tracking back', minimum=1, live=True
    )
    restart_after: int = option(
        0,
        'LOST images after which a new session goes on from the last trusted pose, in the same '
        'map, with a scale of its own; 0 = never',
        minimum=0,
        live=True,
    )


@dataclass(frozen=True)
class ScaleConfig:
    """Where metres come from; without a source the scale of a session is arbitrary."""

    source: str = option(
        'none',
        "'depth': a topic of depth images; 'odometry': the way from odom_frame to the camera; "
        'applied to depth, poses and map alike',
        choices=('none', 'depth', 'odometry'),
    )
    window: int = option(30, 'ratios whose median is the scale', minimum=1, maximum=10_000)
    min_ratios: int = option(3, 'ratios from which on the scale is stated', minimum=1)
    dead_band: float = option(
        0.01, 'the scale follows when its logarithm is off by more than this', minimum=0.0
    )
    max_offset_s: float = option(0.02, 'between an image and its depth image at most', minimum=0.0)
    min_baseline_m: float = option(0.3, 'way of the odometry that makes a ratio', minimum=1e-3)


@dataclass(frozen=True)
class StatusConfig:
    """Log line and diagnostics."""

    period_s: float = option(
        1.0, 'seconds between two messages on /diagnostics', minimum=0.1, maximum=3600.0
    )
    log_period_s: float = option(
        10.0, 'seconds between two status lines in the log', minimum=0.1, maximum=86400.0
    )
    latency_window: int = option(
        300, 'recent frames that latency and rate are computed over', minimum=2, maximum=100_000
    )


@dataclass(frozen=True)
class NodeConfig(CoreConfig):
    """Everything the node reads: the core's options and those of the ROS side."""

    image_transport: str = option(
        'raw',
        'type of the image topic: sensor_msgs/Image or CompressedImage',
        choices=('raw', 'compressed'),
    )
    rectify: str = option(
        'auto',
        "images of a lens whose camera_info has distortion: 'auto' rectifies them, 'never' takes "
        'them as they are',
        choices=('auto', 'never'),
    )
    map_frame: str = option('map', 'frame of map, path and pose')
    odom_frame: str = option(
        '',
        'frame of an odometry that is on /tf: map_frame -> odom_frame is broadcast, such that the '
        'camera is right at the stamp of each image; empty = no odometry',
    )
    base_frame: str = option(
        '',
        'without odometry: the frame that carries the camera, broadcast in its place; empty = the '
        'camera itself, which then must have no other parent',
    )
    camera_frame: str = option('', "optical frame of the camera; empty = the images' frame_id")
    publish_tf: bool = option(
        True, 'broadcast map_frame -> odom_frame, base_frame or camera on /tf', live=True
    )
    tf_timeout_s: float = option(
        0.1,
        'wait this long for transforms at the stamp of an image; then it goes without',
        minimum=0.0,
        maximum=5.0,
    )
    map_orientation: str = option(
        'camera',
        "z of the map: 'camera' takes the first image for level, 'level' asks the odometry, whose "
        'z is up, or, without odom_frame, camera_roll and camera_pitch',
        choices=('camera', 'level'),
    )
    camera_roll: float = option(
        0.0, 'rad, of the first image: positive where its right side hangs down'
    )
    camera_pitch: float = option(
        0.0, 'rad, of the first image: positive where the camera looks down'
    )
    backward_jump_s: float = option(
        0.5,
        'an image this much older than the last one starts a new session (a bag that loops); '
        'one that is less late is dropped',
        minimum=0.0,
    )
    max_gap_s: float = option(
        2.0,
        'warn of pauses between two images that are longer; 0 = never',
        minimum=0.0,
        live=True,
    )
    on_failure: str = option(
        'hold',
        "after an unexpected error: 'hold' waits for ~/reset, 'exit' ends the node",
        choices=('hold', 'exit'),
    )
    autostart: bool = option(True, 'configure and activate without a lifecycle manager')
    outputs: OutputsConfig = field(default_factory=OutputsConfig)
    save_map: SaveMapConfig = field(default_factory=SaveMapConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    status: StatusConfig = field(default_factory=StatusConfig)
