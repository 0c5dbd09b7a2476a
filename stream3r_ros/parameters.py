"""ROS parameters from the configuration tree: same dotted names, help texts, ranges, one check."""

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from stream3r_core.config import flatten, from_dict
from stream3r_core.errors import ConfigError
from stream3r_ros.config import NodeConfig

# Parameters that rclpy itself declares, and the prefix of those it declares with a topic.
RCLPY_PARAMETERS = ('use_sim_time', 'start_type_description_service')
QOS_PREFIX = 'qos_overrides.'
INT_LIMITS = -(2**63), 2**63 - 1


class NodeParameters:
    """Declares the parameters of ``node`` and holds the configuration they stand for.

    The node must have been made with ``automatically_declare_parameters_from_overrides=True``:
    only so can a name be seen, and refused, that no option has. Raises :class:`ConfigError` for
    an unknown parameter and for a value of the wrong type or out of range. :attr:`config` is
    replaced when a live option is set; all others are read-only. :attr:`is_given_any` tells
    whether anything was set from outside.
    """

    def __init__(self, node: Node):
        given = _take_overrides(node)
        self.is_given_any = bool(given)
        self._given_qos = [name for name in given if name.startswith(QOS_PREFIX)]
        values = {name: v for name, v in given.items() if name not in self._given_qos}
        self.config: NodeConfig = from_dict(NodeConfig, nest(values))
        self._node = node
        values = flatten(self.config)
        for name, leaf in leaves(NodeConfig):
            node.declare_parameter(name, values[name], descriptor(leaf), ignore_override=True)
        node.add_on_set_parameters_callback(self._on_set)

    def check_qos_overrides(self) -> None:
        """Refuse QoS parameters of topics that the node does not have; call when all exist."""
        unknown = [name for name in self._given_qos if not self._node.has_parameter(name)]
        if unknown:
            known = sorted(self._node.get_parameters_by_prefix(QOS_PREFIX.rstrip('.')))
            raise ConfigError(
                f'unknown QoS parameter {unknown[0]!r}; known: '
                + ', '.join(QOS_PREFIX + name for name in known)
            )

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        known = flatten(self.config)
        changes = {p.name: p.value for p in parameters if p.name in known}
        try:
            self.config = from_dict(NodeConfig, nest(known | changes))
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)


def leaves(cls: type, prefix: str = '') -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield the dotted name and the field of every leaf of a tree of dataclasses."""
    hints = typing.get_type_hints(cls)
    for leaf in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[leaf.name]):
            yield from leaves(hints[leaf.name], f'{prefix}{leaf.name}.')
        else:
            yield prefix + leaf.name, leaf


def descriptor(leaf: dataclasses.Field) -> ParameterDescriptor:
    """Describe an option: help text, range, choices; read-only unless it is marked live."""
    limits = leaf.metadata
    made = ParameterDescriptor(description=limits['help'], read_only=not limits.get('live', False))
    if 'choices' in limits:
        made.additional_constraints = 'one of ' + ', '.join(map(repr, limits['choices']))
    low, high = limits.get('minimum'), limits.get('maximum')
    if low is None and high is None:
        return made
    if isinstance(leaf.default, float):
        largest = sys.float_info.max
        bounds = -largest if low is None else float(low), largest if high is None else float(high)
        made.floating_point_range = [FloatingPointRange(from_value=bounds[0], to_value=bounds[1])]
    else:
        bounds = INT_LIMITS[0] if low is None else low, INT_LIMITS[1] if high is None else high
        made.integer_range = [IntegerRange(from_value=bounds[0], to_value=bounds[1])]
    return made


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings.

    Raises :class:`ConfigError` where one name is both a value and a group of values.
    """
    root: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split('.')
        group = root
        for key in groups:
            group = group.setdefault(key, {})
            if not isinstance(group, dict):
                raise ConfigError(f'{name}: {key!r} is an option, not a group of options')
        group[last] = value
    return root


def _take_overrides(node: Node) -> dict[str, Any]:
    """Return the parameters given from outside and undeclare them, to be declared properly."""
    given = {
        name: parameter.value
        for name, parameter in node.get_parameters_by_prefix('').items()
        if name not in RCLPY_PARAMETERS
    }
    for name in given:
        node.undeclare_parameter(name)
    return given
