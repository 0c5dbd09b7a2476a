"""The ``stream3r`` command line: a table of subcommands, each loaded only when it is called.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. What follows
``--ros-args`` is kept aside as ``args.ros_args`` for the commands that start a ROS node.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from stream3r_core.errors import Stream3rError
from stream3r_ros.environment import prepare_environment


class Command(NamedTuple):
    """Where a subcommand lives and what it does."""

    module: str
    help: str
    takes_ros_args: bool = False


COMMANDS = {
    'demo': Command('stream3r_ros.demo', 'the whole system on a sample or your own input', True),
    'replay': Command('stream3r_ros.replay', 'reconstruct a bag, video or images offline'),
    'evaluate': Command('stream3r_ros.evaluate', 'a lossless run against ground truth, reported'),
    'compare': Command('stream3r_ros.compare', 'several variants over one input, side by side'),
    'benchmark': Command('stream3r_ros.benchmark', 'time and memory per frame, by mode and stage'),
    'node': Command('stream3r_ros.node', 'run the ROS 2 node', True),
    'play': Command('stream3r_ros.player', 'play a bag, video or images as a live camera', True),
    'view': Command('stream3r_ros.viewer', 'show a node or results in a browser', True),
    'train': Command('stream3r_ros.train', 'train or fine-tune a network from a recipe'),
    'reference': Command('stream3r_ros.reference', 'list topics, services and parameters'),
    'interfaces': Command('stream3r_ros.interfaces', 'build tf2_msgs where ROS 2 comes as wheels'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; known errors end as one line on stderr and exit code 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, ros_args = _split_ros_args(argv)
    try:
        prepare_environment()  # before a command loads torch and ROS, which read it
        args = parse(argv)
        if ros_args and not COMMANDS[args.command].takes_ros_args:
            raise Stream3rError(f'{args.command} starts no ROS node: it takes no --ros-args')
        args.ros_args = ros_args
        return args.run(args)
    except Stream3rError as error:
        print(f'stream3r: error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse ``argv``, importing the module of the chosen subcommand only."""
    parser = argparse.ArgumentParser(
        prog='stream3r', description='Live dense 3D mapping and camera tracking from one camera.'
    )
    parser.add_argument('--version', action='version', version=_version())
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    chosen = next((word for word in argv if not word.startswith('-')), None)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name == chosen:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _split_ros_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split off every ``--ros-args ... [--]``; a bare flag, as launchers append it, is dropped."""
    own, ros_args, in_ros = [], [], False
    for word in argv:
        if word == '--ros-args':
            in_ros = True
        elif in_ros and word == '--':
            in_ros = False
        else:
            (ros_args if in_ros else own).append(word)
    return own, ['--ros-args', *ros_args] if ros_args else []


def _version() -> str:
    return import_module('stream3r_core').__version__


if __name__ == '__main__':
    sys.exit(main())
