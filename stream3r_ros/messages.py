"""Arrays to ROS messages: one layout of each message, for rclpy and for bags without ROS.

:class:`MessageFactory` fills the fields; :func:`rclpy_messages` and :func:`rosbags_messages` give
it the classes of either library, so that node and replay cannot differ in what they say.
"""

import array
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from stream3r_core.geometry import matrix_to_quat_xyzw
from stream3r_core.mapping import MapChange, MapCloud
from stream3r_core.mapping.cloud import pack_rgb
from stream3r_ros.conversions import FLOAT32, PINHOLE, Lens

UINT32 = 6  # of sensor_msgs/PointField
POINT = np.dtype([('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('rgb', '<f4'), ('confidence', '<f4')])
VOXEL = np.dtype(
    [*POINT.descr, ('weight', '<f4'), ('voxel_id_low', '<u4'), ('voxel_id_high', '<u4')]
)


class MessageFactory:
    """Build messages from arrays; all stamps are integer nanoseconds, all lengths metres.

    ``T_a_b`` is the pose of frame b in frame a, [4, 4].
    """

    def __init__(
        self,
        message_class: Callable[[str], Callable[..., Any]],
        sequence: Callable[[np.ndarray], Any],
        zeros: Callable[[int], Any],
        serialize: Callable[[Any], bytes],
    ):
        """Take the four things in which the libraries differ.

        Args:
            message_class: what makes a message of a type such as 'sensor_msgs/msg/Image' from
                its fields.
            sequence: a numpy array as the value of an unbounded array field.
            zeros: the value of a field of so many bytes, to be written through its buffer.
            serialize: CDR bytes of a message.
        """
        self._class = message_class
        self._sequence = sequence
        self._zeros = zeros
        self.serialize = serialize

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message of a type such as 'sensor_msgs/msg/Image' from all of its fields."""
        return self._class(type_name)(**fields)

    def header(self, stamp_ns: int, frame_id: str) -> Any:
        """Return a std_msgs/Header."""
        sec, nanosec = divmod(stamp_ns, 10**9)
        stamp = self.make('builtin_interfaces/msg/Time', sec=sec, nanosec=nanosec)
        return self.make('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)

    def transform(
        self, T_parent_child: np.ndarray, stamp_ns: int, parent_frame: str, child_frame: str
    ) -> Any:
        """Return a geometry_msgs/TransformStamped."""
        translation, rotation = self._rigid('Vector3', T_parent_child)
        return self.make(
            'geometry_msgs/msg/TransformStamped',
            header=self.header(stamp_ns, parent_frame),
            child_frame_id=child_frame,
            transform=self.make(
                'geometry_msgs/msg/Transform', translation=translation, rotation=rotation
            ),
        )

    def tf(self, transforms: Sequence[Any]) -> Any:
        """Return a tf2_msgs/TFMessage of transforms."""
        return self.make('tf2_msgs/msg/TFMessage', transforms=list(transforms))

    def pose(self, T_frame_body: np.ndarray, stamp_ns: int, frame_id: str) -> Any:
        """Return a geometry_msgs/PoseStamped."""
        position, orientation = self._rigid('Point', T_frame_body)
        return self.make(
            'geometry_msgs/msg/PoseStamped',
            header=self.header(stamp_ns, frame_id),
            pose=self.make('geometry_msgs/msg/Pose', position=position, orientation=orientation),
        )

    def odometry(
        self,
        T_frame_body: np.ndarray,
        covariance: np.ndarray,  # [6, 6], axes of the frame
        linear: np.ndarray,  # [3] m / s, axes of the body
        angular: np.ndarray,  # [3] rad / s, likewise
        twist_covariance: np.ndarray,  # [6, 6], axes of the body
        stamp_ns: int,
        frame_id: str,
        body_frame: str,
    ) -> Any:
        """Return a nav_msgs/Odometry of a body in a frame."""
        position, orientation = self._rigid('Point', T_frame_body)
        vectors = (
            self.make('geometry_msgs/msg/Vector3', **dict(zip('xyz', values.tolist())))
            for values in (linear, angular)
        )
        return self.make(
            'nav_msgs/msg/Odometry',
            header=self.header(stamp_ns, frame_id),
            child_frame_id=body_frame,
            pose=self.make(
                'geometry_msgs/msg/PoseWithCovariance',
                pose=self.make(
                    'geometry_msgs/msg/Pose', position=position, orientation=orientation
                ),
                covariance=covariance.ravel(),
            ),
            twist=self.make(
                'geometry_msgs/msg/TwistWithCovariance',
                twist=self.make(
                    'geometry_msgs/msg/Twist', **dict(zip(('linear', 'angular'), vectors))
                ),
                covariance=twist_covariance.ravel(),
            ),
        )

    def path(self, poses: Sequence[Any], stamp_ns: int, frame_id: str) -> Any:
        """Return a nav_msgs/Path of stamped poses, each with its own stamp."""
        header = self.header(stamp_ns, frame_id)
        return self.make('nav_msgs/msg/Path', header=header, poses=list(poses))

    def occupancy_grid(
        self,
        values: np.ndarray,  # [rows, columns] int8: -1 unknown, 0 free .. 100 occupied
        resolution: float,
        origin_xyz: Sequence[float],  # of the corner of cell [0, 0]
        stamp_ns: int,
        frame_id: str,
    ) -> Any:
        """Return a nav_msgs/OccupancyGrid; rows of ``values`` go along y."""
        header, corner = self.header(stamp_ns, frame_id), np.eye(4)
        corner[:3, 3] = origin_xyz
        position, orientation = self._rigid('Point', corner)
        info = self.make(
            'nav_msgs/msg/MapMetaData',
            map_load_time=header.stamp,
            resolution=float(np.float32(resolution)),  # as it arrives
            width=values.shape[1],
            height=values.shape[0],
            origin=self.make('geometry_msgs/msg/Pose', position=position, orientation=orientation),
        )
        data = self._sequence(values.ravel())
        return self.make('nav_msgs/msg/OccupancyGrid', header=header, info=info, data=data)

    def float_image(self, values: np.ndarray, stamp_ns: int, frame_id: str) -> Any:
        """Return a 32FC1 sensor_msgs/Image of ``values`` [H, W]; depth: metres, NaN = invalid."""
        return self._image('32FC1', values.astype('<f4', copy=False), stamp_ns, frame_id)

    def rgb_image(self, rgb: np.ndarray, stamp_ns: int, frame_id: str) -> Any:
        """Return an rgb8 sensor_msgs/Image of ``rgb`` [H, W, 3] uint8."""
        return self._image('rgb8', rgb, stamp_ns, frame_id)

    def compressed_image(self, data: bytes, format: str, stamp_ns: int, frame_id: str) -> Any:
        """Return a sensor_msgs/CompressedImage of an encoded picture ('jpeg' or 'png')."""
        return self.make(
            'sensor_msgs/msg/CompressedImage',
            header=self.header(stamp_ns, frame_id),
            format=format,
            data=self._sequence(np.frombuffer(data, np.uint8)),
        )

    def camera_info(
        self,
        K: np.ndarray,
        height: int,
        width: int,
        stamp_ns: int,
        frame_id: str,
        lens: Lens = PINHOLE,
    ) -> Any:
        """Return the sensor_msgs/CameraInfo of an image; K [3, 3] in its pixels.

        Rectified with ``p``, an image of a distorting lens keeps K.
        """
        K = np.asarray(K, dtype=np.float64)
        return self.make(
            'sensor_msgs/msg/CameraInfo',
            header=self.header(stamp_ns, frame_id),
            height=height,
            width=width,
            distortion_model=lens.model,
            d=self._sequence(np.array(lens.coefficients, np.float64)),
            k=K.ravel(),
            r=np.eye(3).ravel(),
            p=np.hstack([K, np.zeros((3, 1))]).ravel(),
            binning_x=0,
            binning_y=0,
            roi=self.make(
                'sensor_msgs/msg/RegionOfInterest',
                x_offset=0,
                y_offset=0,
                height=0,
                width=0,
                do_rectify=False,
            ),
        )

    def cloud(
        self,
        points_xyz: np.ndarray,  # [N, 3]
        colors_rgb: np.ndarray,  # [N, 3] uint8
        confidence: np.ndarray,  # [N]
        stamp_ns: int,
        frame_id: str,
    ) -> Any:
        """Return an unorganised sensor_msgs/PointCloud2 of finite points.

        Fields x, y, z, rgb and confidence of 4 bytes each; ``rgb`` is 0x00RRGGBB declared as a
        float, which is what RViz and PCL read.
        """
        cloud = MapCloud(points_xyz, colors_rgb, confidence)
        return self.cloud_of_blocks(len(cloud), [cloud], stamp_ns, frame_id)

    def cloud_of_blocks(
        self, num_points: int, blocks: Iterable[MapCloud], stamp_ns: int, frame_id: str
    ) -> Any:
        """Return the PointCloud2 of :meth:`cloud` for points that come in blocks.

        They are written into the message and nowhere else: a large map is held once.
        """
        data, packed = self._records(num_points, POINT)
        start = 0
        for block in blocks:
            _pack(packed[start : start + len(block)], block)
            start += len(block)
        return self._point_cloud(data, packed, stamp_ns, frame_id, is_dense=True)

    def voxels(self, change: MapChange, stamp_ns: int, frame_id: str) -> Any:
        """Return a sensor_msgs/PointCloud2 of changed voxels, those that are gone with NaN.

        Fields as in :meth:`cloud`, and ``weight`` (float32, 0 = removed), ``voxel_id_low`` and
        ``voxel_id_high`` (uint32), the halves of the voxel's number.
        """
        data, packed = self._records(len(change.voxel_ids), VOXEL)
        _pack(packed, change)
        packed['weight'] = change.weight
        packed['voxel_id_low'] = change.voxel_ids & 0xFFFFFFFF
        packed['voxel_id_high'] = change.voxel_ids >> 32
        is_dense = bool((change.weight > 0).all())
        return self._point_cloud(data, packed, stamp_ns, frame_id, is_dense)

    def _records(self, count: int, layout: np.dtype) -> tuple[Any, np.ndarray]:
        """Return a field of bytes and the records [count] that it holds."""
        data = self._zeros(count * layout.itemsize)
        return data, np.frombuffer(data, layout) if count else np.zeros(0, layout)

    def _point_cloud(
        self, data: Any, packed: np.ndarray, stamp_ns: int, frame_id: str, is_dense: bool
    ) -> Any:
        layout = packed.dtype
        return self.make(
            'sensor_msgs/msg/PointCloud2',
            header=self.header(stamp_ns, frame_id),
            height=1,
            width=len(packed),
            fields=[self._point_field(layout, name) for name in layout.names],
            is_bigendian=False,
            point_step=layout.itemsize,
            row_step=packed.nbytes,
            data=data,
            is_dense=is_dense,
        )

    def _image(self, encoding: str, pixels: np.ndarray, stamp_ns: int, frame_id: str) -> Any:
        return self.make(
            'sensor_msgs/msg/Image',
            header=self.header(stamp_ns, frame_id),
            height=pixels.shape[0],
            width=pixels.shape[1],
            encoding=encoding,
            is_bigendian=0,
            step=pixels[0].nbytes,
            data=self._sequence(np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)),
        )

    def _rigid(self, translation_type: str, T: np.ndarray) -> tuple[Any, Any]:
        T = np.asarray(T, dtype=np.float64)
        x, y, z = T[:3, 3].tolist()
        quat_xyzw = matrix_to_quat_xyzw(torch.from_numpy(T[:3, :3])).tolist()
        return (
            self.make(f'geometry_msgs/msg/{translation_type}', x=x, y=y, z=z),
            self.make('geometry_msgs/msg/Quaternion', **dict(zip('xyzw', quat_xyzw))),
        )

    def _point_field(self, layout: np.dtype, name: str) -> Any:
        kind, offset = layout.fields[name]
        return self.make(
            'sensor_msgs/msg/PointField',
            name=name,
            offset=offset,
            datatype=FLOAT32 if kind == np.float32 else UINT32,
            count=1,
        )


def _pack(packed: np.ndarray, points: MapCloud | MapChange) -> None:
    """Write the fields that all clouds have into records [N] of a layout that begins with them."""
    if len(packed):
        width = packed.dtype.itemsize // 4
        packed.view('<f4').reshape(len(packed), width)[:, :3] = points.points_xyz
        packed['rgb'] = pack_rgb(points.colors_rgb)
        packed['confidence'] = points.confidence


def rclpy_class(type_name: str) -> type:
    """Return rclpy's class of a type such as 'sensor_msgs/msg/Image'."""
    package, kind, name = type_name.split('/')
    return getattr(import_module(f'{package}.{kind}'), name)


def rclpy_messages() -> MessageFactory:
    """Return the factory of the classes that rclpy publishes; needs a ROS 2 installation."""
    from rclpy.serialization import serialize_message

    def sequence(values: np.ndarray) -> array.array:
        field = array.array(values.dtype.char)
        field.frombytes(values.view(np.uint8))
        return field

    def zeros(num_bytes: int) -> array.array:
        return array.array('B', [0]) * num_bytes

    def maker(type_name: str) -> Callable[..., Any]:
        message_class = rclpy_class(type_name)
        # Since Jazzy fields are copied where they are not checked; before, they always were.
        checked = {'check_fields': True} if '_check_fields' in message_class.__slots__ else {}

        def make(**fields: Any) -> Any:
            message = message_class(**checked)  # which copies the fields that it is given itself
            for name, value in fields.items():
                setattr(message, name, value)
            return message

        return make

    return MessageFactory(maker, sequence, zeros, serialize_message)


def rosbags_messages() -> MessageFactory:
    """Return the factory of the classes that rosbags writes into bags; needs no ROS."""
    from stream3r_ros.bag import JAZZY

    return MessageFactory(
        JAZZY.types.__getitem__,
        lambda values: values,
        lambda num_bytes: np.zeros(num_bytes, np.uint8),
        lambda message: bytes(JAZZY.serialize_cdr(message, message.__msgtype__)),
    )
