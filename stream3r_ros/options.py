"""What the subcommands share: the configuration from files and flags, and the output folder."""

import argparse
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stream3r_core.config import from_dict, to_dict
from stream3r_core.errors import ConfigError, OutputError
from stream3r_ros.config import NodeConfig

ROS_PARAMETERS = 'ros__parameters'
NOT_OPTIONS = ('use_sim_time', 'qos_overrides')  # of a running node only


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--config`` and ``--set``."""
    parser.add_argument(
        '--config',
        metavar='YAML',
        help='options by name, or a parameter file of the node (config/reconstruct.yaml)',
    )
    parser.add_argument(
        '--set',
        dest='overrides',
        metavar='NAME=VALUE',
        action='append',
        default=[],
        help='set one option, such as session.mode=window; goes before the file; repeatable',
    )


def config_from_args(
    args: argparse.Namespace,
    defaults: Mapping[str, Any] | None = None,
    config_type: type[NodeConfig] = NodeConfig,
) -> NodeConfig:
    """Return the configuration of ``--config`` and ``--set``, over ``defaults`` of the command.

    ``config_type``: NodeConfig, or with the further options of a command.
    Raises :class:`ConfigError` for what cannot be read, is unknown or out of range.
    """
    values: dict[str, Any] = {}
    _merge(values, defaults or {})
    _merge(values, read_options(args.config) if args.config else {})
    for text in args.overrides:
        _set_option(values, text)
    return from_dict(config_type, values)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options, nested or with dotted names, as node parameters or plain.

    Raises :class:`ConfigError` for a file that is missing or is no such YAML.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'cannot read the configuration {path}: {error}') from error
    except yaml.YAMLError as error:
        raise ConfigError(f'{path} is no YAML: {" ".join(str(error).split())}') from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f'{path}: expected options by name, got {document!r:.80}')
    values: dict[str, Any] = {}
    for group in _option_groups(document):
        _merge(values, group)
    return {name: value for name, value in values.items() if name not in NOT_OPTIONS}


def write_options(path: Path, config: NodeConfig) -> None:
    """Write the effective configuration as a parameter file, for node and commands alike."""
    parameters = {'/**': {ROS_PARAMETERS: to_dict(config)}}
    try:
        path.write_text(yaml.safe_dump(parameters, sort_keys=False), encoding='utf-8')
    except OSError as error:
        raise OutputError(f'cannot write {path}: {error}') from error


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--output`` and ``--overwrite``."""
    parser.add_argument('--output', metavar='DIR', required=True, help='folder for the results')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace earlier results in that folder'
    )


def output_folder(
    path: str | Path, names: Iterable[str], overwrite: bool, inputs: Iterable[str] = ()
) -> Path:
    """Make the folder and clear the way for results of these names.

    Raises :class:`OutputError` where results lie already and are not to be replaced, or where
    replacing them would remove one of ``inputs``.
    """
    folder = Path(path)
    existing = [folder / name for name in names if (folder / name).exists()]
    if existing and not overwrite:
        raise OutputError(
            f'{folder} holds {existing[0].name} already: choose another --output or --overwrite it'
        )
    for used in map(Path, inputs):
        if not {used.resolve(), *used.resolve().parents}.isdisjoint(p.resolve() for p in existing):
            raise OutputError(
                f'the results would replace the input {used}; choose another --output'
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in existing:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise OutputError(f'cannot write results into {folder}: {error}') from error
    return folder


def _option_groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the mappings of options in a document: itself, or those of its nodes' parameters."""
    groups = [
        node[ROS_PARAMETERS]
        for node in document.values()
        if isinstance(node, dict) and ROS_PARAMETERS in node
    ]
    return [group or {} for group in groups] or [document]


def _set_option(values: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition('=')
    if not equals or not name:
        raise ConfigError(f'--set: expected NAME=VALUE, got {text!r}')
    try:
        _merge(values, {name: yaml.safe_load(value) if value else ''})
    except yaml.YAMLError as error:
        raise ConfigError(f'--set {name}: {value!r} is no YAML value') from error


def _merge(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put nested or dotted options into nested ones; later ones win."""
    for dotted, value in new.items():
        *groups, last = str(dotted).split('.')
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(f'{dotted}: {group!r} is an option, not a group of options')
        if isinstance(value, Mapping):
            _merge(target.setdefault(last, {}), value)
        else:
            target[last] = value
