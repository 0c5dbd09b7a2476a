"""The ROS 2 side of stream3r_ros: node, bag replay, message layouts and the command line."""
