"""ROS parameters are the configuration tree: same names, described, checked, live where safe."""

import dataclasses
import re

import pytest
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter

from stream3r_core.config import CoreConfig, flatten
from stream3r_core.errors import ConfigError
from stream3r_ros.config import NodeConfig
from stream3r_ros.parameters import NodeParameters, descriptor, leaves, nest

pytestmark = pytest.mark.ros


@pytest.fixture
def make_node(graph):
    """Make nodes with overrides as from the command line or a file."""
    contexts = []

    def make(*ros_args):
        context = rclpy.Context()
        rclpy.init(args=['--ros-args', *ros_args], context=context)
        node = Node(
            'configured', context=context, automatically_declare_parameters_from_overrides=True
        )
        contexts.append((context, node))
        return node

    yield make
    for context, node in contexts:
        node.destroy_node()
        context.shutdown()


def set_one(node, name, value):
    return node.set_parameters([Parameter(name, value=value)])[0]


def test_every_leaf_of_the_tree_is_a_parameter_with_its_default(make_node):
    node = make_node()
    config = NodeParameters(node).config
    assert config == NodeConfig()
    for name, value in flatten(config).items():
        declared = node.get_parameter(name).value
        assert (tuple(declared) if isinstance(value, tuple) else declared) == value, name


def test_the_core_options_keep_their_names():
    assert set(flatten(CoreConfig())) < {name for name, _ in leaves(NodeConfig)}


def test_every_parameter_says_what_it_is(make_node):
    node = make_node()
    NodeParameters(node)
    for name, leaf in leaves(NodeConfig):
        described = node.describe_parameter(name)
        assert described.description == leaf.metadata['help'], name
        assert described.read_only != leaf.metadata.get('live', False), name


def test_ranges_and_choices_reach_the_descriptor():
    described = {name: descriptor(leaf) for name, leaf in leaves(NodeConfig)}
    voxel = described['mapping.voxel_size'].floating_point_range[0]
    assert voxel.from_value == 0.0 and voxel.to_value > 1e300
    assert described['session.window'].integer_range[0].from_value == 1
    assert described['image_transport'].additional_constraints == "one of 'raw', 'compressed'"


def test_values_from_outside_reach_the_configuration(make_node):
    node = make_node(
        '-p', 'session.window:=7', '-p', 'mapping.voxel_size:=1', '-p', 'map_frame:=w'
    )
    config = NodeParameters(node).config
    assert (config.session.window, config.map_frame) == (7, 'w')
    assert config.mapping.voxel_size == 1.0  # a whole number is welcome where a float is meant
    assert node.get_parameter('mapping.voxel_size').value == 1.0
    assert node.get_parameter('session.window').value == 7


def test_a_parameter_file_is_read(make_node, tmp_path):
    file = tmp_path / 'params.yaml'
    file.write_text('/**:\n  ros__parameters:\n    outputs:\n      path: {max_poses: 3}\n')
    assert NodeParameters(make_node('--params-file', str(file))).config.outputs.path.max_poses == 3


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('mapping.voxelsize:=0.1', "unknown option 'voxelsize' in mapping"),
        ('nonsense:=1', "unknown option 'nonsense'"),
        ('image:=3', 'image: expected a mapping'),
        ('session.window.size:=3', 'session.window: expected int'),
        ('session.window:=0', 'session.window: expected a value >= 1'),
        ('session.window:=five', "session.window: expected int, got 'five'"),
        ('image_transport:=theora', 'image_transport: expected one of raw, compressed'),
        ('publish_tf:=1', 'publish_tf: expected bool'),
    ],
)
def test_what_is_not_an_option_is_refused_by_name(make_node, argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        NodeParameters(make_node('-p', argument))


def test_a_name_that_is_both_value_and_group_is_refused():
    with pytest.raises(ConfigError, match="'window' is an option"):
        nest({'session.window': 3, 'session.window.size': 4})


def test_live_options_change_at_run_time(make_node):
    node = make_node()
    parameters = NodeParameters(node)
    assert set_one(node, 'mapping.min_confidence', 3.0).successful
    assert set_one(node, 'outputs.depth.enabled', False).successful
    assert parameters.config.mapping.min_confidence == 3.0
    assert not parameters.config.outputs.depth.enabled
    assert parameters.config == dataclasses.replace(
        NodeConfig(),
        mapping=dataclasses.replace(NodeConfig().mapping, min_confidence=3.0),
        outputs=parameters.config.outputs,
    )


@pytest.mark.parametrize(
    ('name', 'value'),
    [('mapping.min_confidence', 0.5), ('session.window', 3), ('mapping.confidence_quantile', 1.5)],
)
def test_out_of_range_and_read_only_options_are_refused_with_a_reason(make_node, name, value):
    node = make_node()
    parameters = NodeParameters(node)
    result = set_one(node, name, value)
    assert not result.successful and result.reason
    assert parameters.config == NodeConfig()


def test_use_sim_time_is_not_mistaken_for_an_option(make_node):
    node = make_node('-p', 'use_sim_time:=true')
    NodeParameters(node)
    assert node.get_parameter('use_sim_time').value is True


def test_qos_of_a_topic_that_does_not_exist_is_refused(make_node):
    parameters = NodeParameters(make_node('-p', 'qos_overrides./nowhere.subscription.depth:=3'))
    with pytest.raises(ConfigError, match='nowhere'):
        parameters.check_qos_overrides()
