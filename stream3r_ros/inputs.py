"""What the node listens to: images with their calibration, depth images, and transforms."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

from stream3r_core.errors import InputError
from stream3r_ros.config import NodeConfig
from stream3r_ros.live import LiveReconstruction
from stream3r_ros.losses import LossCounter
from stream3r_ros.qos import SENSOR_DATA, Qos
from stream3r_ros.transforms import TransformBuffer


class Inputs:
    """The subscriptions of the node.

    An image goes to ``on_image``; what belongs to it goes to the reconstruction, while there is
    one, and into :attr:`transforms`. What cannot be used is told to ``warn``. :attr:`losses` are
    the images that were sent and did not come.
    """

    def __init__(
        self,
        node: Node,
        config: NodeConfig,
        on_image: Callable[[Image | CompressedImage], None],
        reconstruction: Callable[[], LiveReconstruction | None],
        warn: Callable[[str], None],
    ):
        self._node, self._on_image, self._warn = node, on_image, warn
        self._reconstruction = reconstruction
        self.transforms = TransformBuffer()
        self._losses = LossCounter(self._image_publishers)
        self._listen_to_images(config)
        has_depth = config.scale.source == 'depth'
        if has_depth:
            self._listen(Image, 'depth', self._take_depth)
            self._listen(CameraInfo, 'depth_camera_info', self._take_depth_camera_info)
        if config.odom_frame or config.base_frame or has_depth:
            self._listen_to_transforms()

    @property
    def losses(self) -> dict[str, int]:
        """Images that were sent and did not come, by reason."""
        return self._losses.by_reason

    @property
    def is_camera_info_announced(self) -> bool:
        """Whether anybody publishes intrinsics."""
        return self._node.count_publishers(self._node.resolve_topic_name('camera_info')) > 0

    def _listen_to_images(self, config: NodeConfig) -> None:
        kind, self.image_topic = Image, self._node.resolve_topic_name('image')
        if config.image_transport == 'compressed':
            kind = CompressedImage
            if not self.image_topic.endswith('/compressed'):
                self.image_topic += '/compressed'  # where image_transport publishes it
        losses = SubscriptionEventCallbacks(message_lost=self._note_losses)
        self._listen(kind, self.image_topic, self._take_image, event_callbacks=losses)
        self._listen(CameraInfo, 'camera_info', self._take_camera_info)

    def _listen_to_transforms(self) -> None:
        for topic, qos in (('/tf', Qos(depth=100)), ('/tf_static', Qos(depth=100, latched=True))):
            take = partial(self._take_transforms, is_static=topic == '/tf_static')
            self._node.create_subscription(TFMessage, topic, take, qos.for_rclpy())

    def _listen(self, kind: type, topic: str, take: Callable[..., None], **options: Any) -> None:
        self._node.create_subscription(
            kind,
            topic,
            take,
            SENSOR_DATA.for_rclpy(),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            **options,
        )

    def _take_image(self, message: Image | CompressedImage, info: Mapping[str, Any]) -> None:
        self._losses.arrived(info.get('publication_sequence_number'))
        self._on_image(message)

    def _image_publishers(self) -> set[bytes]:
        found = self._node.get_publishers_info_by_topic(self.image_topic)
        return {bytes(publisher.endpoint_gid) for publisher in found}

    def _note_losses(self, event: Any) -> None:
        self._losses.noticed(event.total_count_change)
        self._warn(
            f'{event.total_count} images were lost on the way: see the troubleshooting of DDS'
        )

    def _take_camera_info(self, message: CameraInfo) -> None:
        live = self._reconstruction()
        if live is not None:
            live.camera_info = message

    def _take_depth(self, message: Image) -> None:
        live = self._reconstruction()
        if live is None:
            return
        try:
            live.scale_source.depth_images.add(message)
        except InputError as error:
            self._warn(f'depth image rejected: {error}')

    def _take_depth_camera_info(self, message: CameraInfo) -> None:
        live = self._reconstruction()
        if live is not None:
            live.scale_source.depth_images.camera_info = message

    def _take_transforms(self, message: TFMessage, is_static: bool) -> None:
        try:
            self.transforms.add(message, is_static)
        except InputError as error:
            self._warn(str(error))
