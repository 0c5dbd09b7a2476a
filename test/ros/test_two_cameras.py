"""Two cameras are two nodes in two namespaces, and nothing of one reaches the other."""

import pytest
import yaml
from node_harness import ROOT, SMALL, one_thread, picture, stamp
from sensor_msgs.msg import Image

from stream3r_ros.conversions import stamp_ns
from stream3r_ros.messages import rclpy_class, rclpy_messages
from stream3r_ros.outputs import TOPICS

pytestmark = pytest.mark.ros
NAMES = ('left', 'right')


def test_two_cameras_are_two_nodes_in_two_namespaces(spawn, node, spin_until, tmp_path):
    messages, seen, cameras, children = rclpy_messages(), {}, {}, {}
    shared = {'/**': {'ros__parameters': SMALL}}  # one file for both, as a fleet has it
    own = {f'/{n}/stream3r': {'ros__parameters': {'map_frame': f'{n}_map'}} for n in NAMES}
    (tmp_path / 'both.yaml').write_text(yaml.safe_dump(shared | own))
    for name in NAMES:
        log = (tmp_path / name).open('w')
        file = tmp_path / 'both.yaml'
        arguments = ('node', '--ros-args', '-r', f'__ns:=/{name}', '--params-file', file)
        children[name] = spawn(
            '-m', 'stream3r_ros', *arguments, cwd=ROOT, stdout=log, stderr=log, env=one_thread()
        )
        cameras[name] = node.create_publisher(Image, f'/{name}/image', 10)
        seen[name] = []
        for topic in ('~/pose', '~/odometry'):
            kind, qos = TOPICS[topic]
            full = topic.replace('~', f'/{name}/stream3r')
            node.create_subscription(rclpy_class(kind), full, seen[name].append, qos.for_rclpy())
    edges = []
    kind, qos = TOPICS['/tf']
    node.create_subscription(rclpy_class(kind), '/tf', edges.append, qos.for_rclpy())
    numbers = dict.fromkeys(NAMES, 0)

    def each_has_answered():
        for name, camera in cameras.items():
            assert children[name].poll() is None, (tmp_path / name).read_text()
            if not seen[name]:  # best effort: an early image may find no listener
                pixels = messages.rgb_image(
                    picture(NAMES.index(name)), stamp(numbers[name]), f'{name}_eye'
                )
                numbers[name] += 1
                camera.publish(pixels)
        return all(len(seen[name]) > 1 for name in NAMES)

    spin_until(each_has_answered)
    for name in NAMES:
        assert {m.header.frame_id for m in seen[name]} == {f'{name}_map'}
        assert {stamp_ns(m) for m in seen[name]} <= {stamp(n) for n in range(numbers[name])}

    def links():
        return {(t.header.frame_id, t.child_frame_id) for m in edges for t in m.transforms}

    expected = {(f'{name}_map', f'{name}_eye') for name in NAMES}
    spin_until(lambda: links() >= expected)
    assert links() == expected
