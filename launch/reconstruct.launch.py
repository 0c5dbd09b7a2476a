"""The live node on a camera's topics: ``stream3r node`` with launch arguments.

ros2 launch stream3r_ros reconstruct.launch.py image_topic:=/camera/image_raw rviz:=true
"""

import os

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch_ros.actions import Node
from launch_ros.substitutions import ExecutableInPackage

from stream3r_ros.environment import prepare_environment
from stream3r_ros.resources import resource

NODE_NAME = 'stream3r'
# Arguments that set a parameter of the node when given; they win over the parameter file.
PARAMETERS = {
    'preset': ('model.preset', 'network: tiny, stream3r or streamvggt'),
    'weights': (
        'model.weights',
        "Hugging Face id, folder or file of weights; 'random': untrained",
    ),
    'device': ('model.device', 'auto, cpu, cuda or cuda:1'),
    'image_transport': ('image_transport', 'raw or compressed'),
    'map_frame': ('map_frame', 'frame of map, path and pose'),
    'odom_frame': ('odom_frame', 'frame of an odometry that is on /tf'),
    'base_frame': ('base_frame', 'frame that carries the camera'),
    'camera_frame': ('camera_frame', "optical frame, in place of the images' frame_id"),
    'scale_source': ('scale.source', 'where metres come from: none, depth or odometry'),
    'save_directory': ('save_map.directory', 'folder that ~/save_map writes into'),
}
# Topics of config/reconstruct.rviz, which shows the node of this launch wherever it is.
SHOWN = ('cloud', 'map', 'path', 'pose', 'depth/image', 'depth/camera_info', 'occupancy_grid')


def generate_launch_description() -> LaunchDescription:
    prepare_environment(os.environ)  # node, player and RViz inherit it
    flag = {'default_value': 'false', 'choices': ['true', 'false']}
    return LaunchDescription(
        [
            DeclareLaunchArgument('image_topic', default_value='/camera/image_raw'),
            DeclareLaunchArgument(
                'info_topic', default_value='', description='empty: camera_info beside the images'
            ),
            DeclareLaunchArgument(
                'depth_topic', default_value='', description='depth images: sets scale_source'
            ),
            DeclareLaunchArgument(
                'depth_info_topic',
                default_value='',
                description='their camera_info; empty: beside them',
            ),
            DeclareLaunchArgument(
                'params_file', default_value=str(resource('config/reconstruct.yaml'))
            ),
            *(
                DeclareLaunchArgument(
                    name, default_value='', description=f'{text}; empty: as in params_file'
                )
                for name, (_, text) in PARAMETERS.items()
            ),
            DeclareLaunchArgument('namespace', default_value='', description='of node and topics'),
            DeclareLaunchArgument('use_sim_time', **flag),
            DeclareLaunchArgument('rviz', **flag, description='show it'),
            DeclareLaunchArgument('bag', default_value='', description='a bag to play with it'),
            OpaqueFunction(function=actions),
        ]
    )


def actions(context: LaunchContext) -> list:
    given = {name: text for name, text in context.launch_configurations.items() if text}
    image_topic = given['image_topic']
    info_topic = given.get('info_topic') or beside(image_topic)
    overrides = {
        parameter: given[name] for name, (parameter, _) in PARAMETERS.items() if name in given
    }
    overrides['use_sim_time'] = given['use_sim_time'] == 'true'
    remappings = [('image', image_topic), ('camera_info', info_topic)]
    if 'depth_topic' in given:
        overrides.setdefault('scale.source', 'depth')
        depth_info = given.get('depth_info_topic') or beside(given['depth_topic'])
        remappings += [('depth', given['depth_topic']), ('depth_camera_info', depth_info)]
    node = Node(
        package='stream3r_ros',
        executable='stream3r',
        arguments=['node'],
        name=NODE_NAME,
        namespace=given.get('namespace', ''),
        parameters=[given['params_file'], overrides],
        remappings=remappings,
        output='screen',
    )
    started = [node]
    if given['rviz'] == 'true':
        started.append(rviz(image_topic, given.get('namespace', ''), given.get('map_frame', '')))
    if 'bag' in given:
        command = [ExecutableInPackage('stream3r', 'stream3r_ros'), 'play', given['bag']]
        started.append(ExecuteProcess(cmd=command, output='screen'))
    return started


def rviz(image_topic: str, namespace: str, map_frame: str) -> Node:
    fixed_frame = ['-f', map_frame] if map_frame else []
    here = '/'.join(['', *namespace.strip('/').split('/'), NODE_NAME]).replace('//', '/')
    return Node(
        package='rviz2',
        executable='rviz2',
        arguments=['-d', str(resource('config/reconstruct.rviz')), *fixed_frame],
        remappings=[
            ('/camera/image_raw', image_topic),
            *((f'/{NODE_NAME}/{topic}', f'{here}/{topic}') for topic in SHOWN),
        ],
        output='log',
    )


def beside(image_topic: str) -> str:
    """Return the conventional name of the camera_info that belongs to an image topic."""
    return image_topic.removesuffix('/compressed').rpartition('/')[0] + '/camera_info'
