"""The environment that a ROS 2 process of this package starts in."""

import os
import random
import socket
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from stream3r_core.errors import Stream3rError
from stream3r_ros.resources import resource

# Fast DDS 2 (Humble, Jazzy) and Fast DDS 3 (Kilted) read the first and the second name.
PROFILE_VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
TRANSPORT_VARIABLE = 'FASTDDS_BUILTIN_TRANSPORTS'
LOG_VARIABLES = ('ROS_LOG_DIR', 'ROS_HOME', 'HOME')


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give ROS 2 what it does not come with; call before ``rclpy.init``, children inherit it.

    - Images and clouds get through Fast DDS by ``config/fastdds.xml``; with its defaults it loses
      most best-effort messages above 500 kB. A profile or transport that the user chose is kept;
      an empty value, which Fast DDS would report as broken XML, counts as none.
    - Logs go to the temporary folder where there is no home, without which rclpy does not start.
    - Threads of PyTorch that wait for each other sleep instead of spinning (read when torch is
      imported): on a processor with other work, camera and RViz say, spinning costs many times
      the frame itself.
    """
    _choose_dds_profile(environ)
    environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    if not any(environ.get(name) for name in LOG_VARIABLES):
        environ['ROS_LOG_DIR'] = os.path.join(tempfile.gettempdir(), 'ros_log')


def _choose_dds_profile(environ: MutableMapping[str, str]) -> None:
    for name in (*PROFILE_VARIABLES, TRANSPORT_VARIABLE):
        if environ.get(name):
            return
        environ.pop(name, None)
    profile = str(resource('config/fastdds.xml'))
    for name in PROFILE_VARIABLES:
        environ[name] = profile


@contextmanager
def private_graph() -> Iterator[dict[str, str]]:
    """Reserve a ROS domain that nobody on this machine uses, for the time of the block.

    Yields the environment variables with which a process joins it and stays on this machine.
    Raises :class:`Stream3rError` when all domains are taken.
    """
    for domain in random.SystemRandom().sample(range(1, 102), 101):
        lock = _lock_domain(domain)
        if lock is not None:
            break
    else:
        raise Stream3rError('all ROS domains 1..101 are in use on this machine; stop some nodes')
    humble = os.environ.get('ROS_DISTRO') == 'humble'  # knows the older variable only
    reach = (
        {'ROS_LOCALHOST_ONLY': '1'} if humble else {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    )
    with lock:
        yield {'ROS_DOMAIN_ID': str(domain), **reach}


def _lock_domain(domain: int) -> socket.socket | None:
    """Take a domain by listening on a TCP port of its own, unless a DDS participant is there."""
    base = 7400 + 250 * domain  # RTPS 9.6.1.1: the ports of a domain start here
    lock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first_participant:
        try:
            first_participant.bind(('', base + 10))
            lock.bind(('127.0.0.1', base))
        except OSError:
            lock.close()
            return None
    return lock
