"""Reconstruct a bag, a video or images offline: ``stream3r replay`` with launch arguments.

ros2 launch stream3r_ros replay.launch.py input:=/path/to/bag output:=/path/to/results
"""

import sys

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration

OPTIONAL = {
    'image_topic': 'images of the bag; empty: the only topic that it can be',
    'camera_info': "topic of the bag's intrinsics, or auto; empty: they are not used",
    'ground_truth': 'trajectory file or topic to compare with, or none; empty: what the bag has',
    'config': 'parameter file, as for the node; empty: the defaults',
}


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument('input', description='bag, video or folder of images'),
            DeclareLaunchArgument('output', description='folder for the results'),
            DeclareLaunchArgument(
                'overwrite',
                default_value='false',
                choices=['true', 'false'],
                description='replace earlier results in that folder',
            ),
            *(
                DeclareLaunchArgument(name, default_value='', description=text)
                for name, text in OPTIONAL.items()
            ),
            OpaqueFunction(function=replay),
        ]
    )


def replay(context: LaunchContext) -> list[ExecuteProcess]:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    command = [sys.executable, '-m', 'stream3r_ros', 'replay', value('input')]
    command += ['--output', value('output')]
    if value('overwrite') == 'true':
        command.append('--overwrite')
    for name in OPTIONAL:
        if value(name):
            command += ['--' + name.replace('_', '-'), value(name)]
    return [ExecuteProcess(cmd=command, output='screen')]
