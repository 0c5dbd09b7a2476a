"""The reference page says what the code says, and the code what the running node does."""

import pytest

from stream3r_ros.cli import main
from stream3r_ros.outputs import TOPICS
from stream3r_ros.reference import BEGIN, INPUTS, OUTPUTS, SERVICES, tables
from stream3r_ros.resources import share_folder

pytestmark = pytest.mark.ros
RCLPY = {'/rosout', '/parameter_events', '/clock'}


def test_the_page_ends_with_the_tables_of_the_code(capsys):
    page = (share_folder() / 'stream3r_ros' / 'REFERENCE.md').read_text()
    assert page.split(BEGIN)[1].strip() == tables().strip()
    assert main(['reference']) == 0
    assert capsys.readouterr().out == tables()


def test_every_output_is_described():
    assert set(OUTPUTS) == set(TOPICS)


def full(name):
    return name.replace('~', '/stream3r') if name.startswith(('~', '/')) else f'/{name}'


def test_a_running_node_has_these_topics_and_services(live, node):
    live.start(**{'odom_frame': 'odom', 'scale.source': 'depth'})
    live.wait_until(lambda: ('stream3r', '/') in node.get_node_names_and_namespaces())

    def ask(kind):
        names_and_types = getattr(node, f'get_{kind}_names_and_types_by_node')('stream3r', '/')
        return {name: types for name, types in names_and_types if name not in RCLPY}

    inputs = {full(name): topic.type for name, topic in INPUTS.items()}
    live.wait_until(lambda: ask('subscriber').keys() == inputs.keys())
    assert all(types[0] in inputs[name] for name, types in ask('subscriber').items())
    outputs = {full(name): [topic.type] for name, topic in TOPICS.items()}
    live.wait_until(lambda: outputs.items() <= ask('publisher').items())
    others = ask('publisher').keys() - outputs.keys()
    assert others == {'/diagnostics', '/stream3r/transition_event'}

    def triggers():
        return {n for n, types in ask('service').items() if types == ['std_srvs/srv/Trigger']}

    services = {full(name) for name in SERVICES}
    live.wait_until(lambda: triggers() == services)
