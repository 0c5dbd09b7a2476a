"""Quality of service of a topic, stated once for publishers and for recorded bags."""

from typing import Any, NamedTuple


class Qos(NamedTuple):
    """Keep the last ``depth`` messages; reliable unless ``best_effort``.

    ``latched`` (transient local) gives late subscribers the last message.
    """

    depth: int = 10
    latched: bool = False
    best_effort: bool = False

    def for_rclpy(self) -> Any:
        """Return the rclpy QoSProfile; needs a ROS 2 installation."""
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

        return QoSProfile(
            depth=self.depth,
            durability=DurabilityPolicy[self._durability],
            reliability=ReliabilityPolicy[self._reliability],
        )

    def for_rosbags(self) -> Any:
        """Return the profile that rosbags writes as the one offered by the publisher."""
        from rosbags.interfaces import (
            Qos as Profile,
        )
        from rosbags.interfaces import (
            QosDurability,
            QosHistory,
            QosLiveliness,
            QosReliability,
            QosTime,
        )

        forever = QosTime(sec=9223372036, nsec=854775807)  # RMW_DURATION_INFINITE
        return Profile(
            history=QosHistory.KEEP_LAST,
            depth=self.depth,
            reliability=QosReliability[self._reliability],
            durability=QosDurability[self._durability],
            deadline=forever,
            lifespan=forever,
            liveliness=QosLiveliness.AUTOMATIC,
            liveliness_lease_duration=forever,
            avoid_ros_namespace_conventions=False,
        )

    @property
    def _durability(self) -> str:
        return 'TRANSIENT_LOCAL' if self.latched else 'VOLATILE'

    @property
    def _reliability(self) -> str:
        return 'BEST_EFFORT' if self.best_effort else 'RELIABLE'


SENSOR_DATA = Qos(depth=5, best_effort=True)  # rmw_qos_profile_sensor_data
LATCHED = Qos(depth=1, latched=True)
