"""Weights: find them, check them, put them into the network; code in a file is never executed."""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stream3r_core.config import PRESETS, ModelConfig, flatten, model_config, to_dict
from stream3r_core.errors import CheckpointError, ConfigError, first_line
from stream3r_core.model.network import CausalVGGT
from stream3r_core.uncertainty import read_uncertainty, uncertainty_path

#: The published checkpoints; the licences of all three forbid commercial use.
PUBLISHED = {
    'yslan/STream3R': 'model.safetensors',
    'lch01/StreamVGGT': 'checkpoints.pth',
    'facebook/VGGT-1B': 'model.pt',
}
SUFFIXES = ('.safetensors', '.pt', '.pth')
SHIPPED = Path(__file__).parent / 'weights'
RANDOM_SEED = 0

_log = logging.getLogger(__name__)
_WRAPPERS = ('state_dict', 'model')
_PREFIXES = ('module.', 'net.')
_HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights of a network came from."""

    source: str  # Hugging Face id and revision, path, 'shipped:<preset>' or 'random'
    file_name: str  # empty for random weights
    sha256: str  # of the file, hexadecimal; empty for random weights
    num_tensors: int
    num_parameters: int


def load_model(
    preset_or_config: str | ModelConfig | Mapping[str, Any] | None,
    weights: str | os.PathLike | None = None,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> CausalVGGT:
    """Build a network with its weights, ready for inference; ``.weights_info`` says which.

    ``preset_or_config``: preset name, configuration, or None to take the one written in the file.
    ``weights``: Hugging Face id (with ``revision``), folder, or file (.safetensors, .pt, .pth);
    None for those shipped with the preset; ``'random'`` for an untrained network, always the same.
    ``dtype``: precision of the matrix products of the aggregator (:meth:`CausalVGGT.set_dtype`);
    None: float32 on a CPU, bfloat16 on a GPU, float16 on one too old for that. (The configuration
    goes further: see :func:`stream3r_core.pipeline.resolve_dtype`.)
    ``.uncertainties`` has what is known of its errors, by name (:mod:`.uncertainty`).
    Raises :class:`CheckpointError` if weights are missing or do not fit, :class:`ConfigError` for
    an unknown preset.
    """
    config = None if preset_or_config is None else model_config(preset_or_config)
    device = torch.device(device)
    if weights == 'random':
        model = _random_model(config)
    else:
        path, source = _find(preset_or_config, weights, revision)
        _log.info('reading %s, %.1f MB', path, path.stat().st_size / 1e6)
        model = _model_from_file(config, path, source)
    dtype = dtype or default_dtype(device)
    _log.info('%d tensors read; moving them to %s', model.weights_info.num_tensors, device)
    model.set_dtype(dtype).to(device).eval()
    for convolutions in (model.aggregator.patch_embed, model.depth_head, model.point_head):
        convolutions.to(memory_format=torch.channels_last)  # what their kernels work in
    return model


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that serves a device; on a CPU the exact one."""
    if device.type != 'cuda':
        return torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bfloat16 else torch.float16


def save_model(model: CausalVGGT, path: str | os.PathLike) -> None:
    """Write the weights and the configuration as one .safetensors file, whole or not at all."""
    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    unfinished = path.with_name(path.name + '.part')
    save_file(tensors, unfinished, {'config': json.dumps(to_dict(model.config)), 'format': 'pt'})
    unfinished.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(
    preset: str | ModelConfig | Mapping[str, Any] | None,
    weights: str | os.PathLike | None = None,
    revision: str | None = None,
) -> str:
    """Return the SHA-256 of the file that :func:`load_model` would load; '' for random weights."""
    return '' if weights == 'random' else file_sha256(_find(preset, weights, revision)[0])


def _random_model(config: ModelConfig | None) -> CausalVGGT:
    if config is None:
        raise ConfigError(f'random weights need a preset ({", ".join(PRESETS)}) or configuration')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = CausalVGGT(config)
    model.weights_info = _info(model, 'random')
    return model


def _model_from_file(config: ModelConfig | None, path: Path, source: str) -> CausalVGGT:
    tensors, file_config = read_weights(path)
    config = _agreed_config(config, file_config, path)
    if config.track is None:
        tensors = {k: v for k, v in tensors.items() if not k.startswith('track_head.')}
    with torch.device('meta'):
        model = CausalVGGT(config)
    _check_fit(model.state_dict(), tensors, path)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    model.weights_info = _info(model, source, path.name, file_sha256(path))
    model.uncertainties = read_uncertainty(uncertainty_path(path), model.weights_info.sha256)
    return model


def _info(model: CausalVGGT, source: str, file_name: str = '', sha256: str = '') -> WeightsInfo:
    tensors = model.state_dict().values()
    return WeightsInfo(source, file_name, sha256, len(tensors), sum(t.numel() for t in tensors))


def _find(
    preset: str | ModelConfig | Mapping[str, Any] | None,
    weights: str | os.PathLike | None,
    revision: str | None,
) -> tuple[Path, str]:
    """Return the file of weights and the words for where it came from."""
    path = Path(weights).expanduser() if weights else None
    if path is not None and not path.exists() and _is_hub_id(weights):
        return _download(str(weights), revision), f'{weights}@{revision or "main"}'
    if revision:
        raise CheckpointError(
            f'revision {revision!r} is for a Hugging Face id such as {next(iter(PUBLISHED))!r}, '
            f'but weights is {str(weights)!r}; leave the revision out'
        )
    if path is None:
        return _shipped(preset)
    if path.is_dir():
        return _file_in(path), str(weights)
    if not path.is_file():
        raise CheckpointError(f'{weights}: no such file or folder. {_where_to_get_weights()}')
    return path, str(weights)


def _is_hub_id(weights: str | os.PathLike) -> bool:
    text = str(weights)
    return bool(_HUB_ID.fullmatch(text)) and not text.endswith(SUFFIXES)


def _shipped(preset: Any) -> tuple[Path, str]:
    if isinstance(preset, str) and (path := SHIPPED / f'{preset}.safetensors').is_file():
        return path, f'shipped:{preset}'
    what = f'preset {preset!r}' if isinstance(preset, str) else 'a configuration of your own'
    raise CheckpointError(f'no weights come with {what}. {_where_to_get_weights()}')


def _where_to_get_weights() -> str:
    return (
        f'Give a Hugging Face id ({", ".join(PUBLISHED)}; non-commercial licences), a folder, or '
        f"a file ({', '.join(SUFFIXES)}); weights='random' makes an untrained network"
    )


def _file_in(folder: Path) -> Path:
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    known = [f for f in files if f.name in PUBLISHED.values()]
    choice = known if len(known) == 1 else files
    if len(choice) == 1:
        return choice[0]
    found = ', '.join(f.name for f in files) or 'none'
    raise CheckpointError(
        f'{folder}: expected one file of weights ({", ".join(SUFFIXES)}), found {found}; '
        'give the file itself'
    )


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = PUBLISHED.get(hub_id)
    names = [known] if known else list(dict.fromkeys(PUBLISHED.values()))
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f'{hub_id}: no such folder here, the Hugging Face hub cannot be reached, and '
                f'{name} is not in its local cache. Connect once, or download the file elsewhere '
                'and give its path'
            ) from error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f'{hub_id}: download failed: {_named(error)}') from error
    raise CheckpointError(
        f'{hub_id} (revision {revision or "main"}) has none of the files {", ".join(names)}'
    )


def read_weights(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    """Return the tensors of a file under their plain names, and the configuration it carries.

    Large files stay mapped from disk until they are moved or changed.
    """
    if path.suffix == '.safetensors':
        content, file_config = _read_safetensors(path)
    elif path.suffix in SUFFIXES:
        content, file_config = _read_torch(path), None
    else:
        raise CheckpointError(
            f'{path}: unknown kind of file {path.suffix!r}; expected {", ".join(SUFFIXES)}'
        )
    tensors = _plain_names(_unwrapped(content, path))
    if not tensors:
        raise CheckpointError(f'{path}: holds no tensors; expected the weights of a network')
    return tensors, file_config


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], ModelConfig | None]:
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if 'config' not in metadata:
        return tensors, None
    try:
        return tensors, ModelConfig.from_dict(json.loads(metadata['config']))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: the 'config' in its metadata is not a model configuration: {error}"
        ) from error


def _read_torch(path: Path) -> Any:
    """Unpickle tensors, containers and plain options, and refuse everything else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # foreign bytes fail in any place of the unpickler
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f'{path}: cannot be read as weights; it is truncated, of another kind, or holds objects '
        f'other than tensors, which are never loaded ({_named(error)}). Download it again, '
        'or save its plain state dict'
    )


def _named(error: Exception) -> str:
    return f'{type(error).__name__}: {first_line(error)}'


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict inside a training checkpoint."""
    while isinstance(content, Mapping):
        inner = next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            return {k: v for k, v in content.items() if isinstance(v, Tensor)}
        content = inner
    raise CheckpointError(f'{path}: expected named tensors, got {type(content).__name__}')


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefixes of training wrappers; tensors without one are bookkeeping."""
    while prefix := next((p for p in _PREFIXES for name in tensors if name.startswith(p)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return tensors


def _agreed_config(
    wanted: ModelConfig | None, found: ModelConfig | None, path: Path
) -> ModelConfig:
    if wanted is None and found is None:
        raise CheckpointError(
            f'{path}: carries no configuration; name a preset ({", ".join(PRESETS)})'
        )
    if wanted is not None and wanted.track is None and found is not None:
        found = dataclasses.replace(found, track=None)  # its track head is left out
    if wanted is None or found is None or wanted == found:
        return found or wanted
    ours, theirs = flatten(wanted), flatten(found)
    name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
    raise CheckpointError(
        f'{path}: was made for another network: {name} is {theirs.get(name)} there and '
        f'{ours.get(name)} in the configuration asked for'
    )


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f'{name} {list(found[name].shape)} {found[name].dtype} instead of {list(tensor.shape)}'
        for name, tensor in expected.items()
        if name in found
        and (found[name].shape != tensor.shape or not found[name].is_floating_point())
    ]
    faults = {'missing': missing, 'unexpected': unexpected, 'of wrong shape or type': wrong}
    if any(faults.values()):
        listed = '; '.join(f'{len(v)} {k} ({_some(v)})' for k, v in faults.items() if v)
        raise CheckpointError(
            f'{path}: does not fit the network of {len(expected)} tensors: {listed}. '
            'Check that preset and weights belong together'
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
