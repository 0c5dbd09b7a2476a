"""A map on disk: submaps, keyframes and graph in one safetensors file.

Layout, version 1. The file is a safetensors file (https://github.com/huggingface/safetensors):
an 8-byte little-endian length, a JSON header of names, types, shapes and offsets, then the raw
arrays. Nothing in it is executed. The header's ``__metadata__`` holds

- ``format``: ``stream3r-map``, ``version``: ``1``
- ``map``: JSON with ``submaps`` (list, in order: ``key``, ``path_length``, ``voxel_size``,
  ``keyframes``), ``edges`` (list: ``kind``, ``keys``, ``state`` of ``graph``, ``doubted`` or
  ``waiting``, ``on_trial``, ``times_off``), ``next_key``, ``last_frame_id``, ``drift_factor`` (by
  which drift was found to exceed its model; absent: 1) and ``network`` (SHA-256 of the weights
  that described the places; empty or absent: not known). A keyframe has ``frame_id``,
  ``stamp_ns`` (null: none) and the names of the arrays that it has.

A map of other weights is refused: their descriptors mean other things, so that no place would ever
be recognised, and nothing would say so.

Arrays, with k the key of a submap, n its keyframe's place in the list and e that of the edge:

| name | type and shape | meaning |
|---|---|---|
| ``submap.k.S_map_submap`` | float64 [4, 4] | place of the submap |
| ``submap.k.S_odom_submap`` | float64 [4, 4] | place without loops |
| ``submap.k.frame_ids``, ``.stamps_ns`` | int64 [N] | frames; stamp -2^63: none |
| ``submap.k.T_submap_camera`` | float64 [N, 4, 4] | their rigid poses |
| ``submap.k.points_xyz`` | float32 [P, 3] | points, submap frame and unit |
| ``submap.k.colors_rgb``, ``.confidence`` | uint8 [P, 3], float32 [P] | of the points |
| ``submap.k.keyframe.n.T_submap_camera``, ``.K`` | float64 [4, 4], [3, 3] | pose, pixels |
| ``submap.k.keyframe.n.depth``, ``.confidence`` | float32 [h, w] | grid |
| ``submap.k.keyframe.n.descriptor``, ``.image_rgb`` | float32 [C], uint8 [H, W, 3] | optional |
| ``edge.e.measurement``, ``.covariance`` | float64 | see ``pose_graph.Edge`` |
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stream3r_core.backend.backend import SubmapBackend
from stream3r_core.backend.keyframes import Keyframe
from stream3r_core.backend.pose_graph import Edge
from stream3r_core.backend.submap import Submap
from stream3r_core.errors import DataError, InputError
from stream3r_core.files import write_bytes
from stream3r_core.mapping import MapCloud

FORMAT, VERSION = 'stream3r-map', '1'
_POINTS = ('points_xyz', 'colors_rgb', 'confidence')
_VIEW = ('T_submap_camera', 'K', 'depth', 'confidence')
_OPTIONAL = ('descriptor', 'image_rgb')
_STATES = ('graph', 'doubted', 'waiting')


def save_map(backend: SubmapBackend, path: str | Path) -> None:
    """Write the map of a back end; a previous file stays whole until the new one is complete.

    Raises:
        OutputError: The file cannot be written.

    """
    write_bytes(path, pack_map(backend))


def pack_map(backend: SubmapBackend) -> bytes:
    """Return the content of a map file.

    Call it from the thread that feeds the back end, while nothing waits to be followed. The submap
    that is open is saved as it is.
    """
    arrays: dict[str, np.ndarray] = {}
    submaps = [_pack_submap(backend, submap, arrays) for submap in backend.atlas.submaps.values()]
    content = {
        'submaps': submaps,
        'edges': _pack_edges(backend, arrays),
        'next_key': backend.next_key,
        'last_frame_id': backend.last_frame_id,
        'drift_factor': backend.arbiter.drift_factor,
        'network': backend.network,
    }
    metadata = {'format': FORMAT, 'version': VERSION, 'map': json.dumps(content)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(arrays, metadata)


def _pack_submap(backend: SubmapBackend, submap: Submap, arrays: dict[str, np.ndarray]) -> dict:
    prefix, cloud = f'submap.{submap.key}', submap.cloud
    arrays[f'{prefix}.S_map_submap'] = backend.atlas.S_map_submap(submap.key)
    arrays[f'{prefix}.S_odom_submap'] = backend.S_odom_submap(submap.key)
    for name in ('frame_ids', 'stamps_ns', 'T_submap_camera'):
        arrays[f'{prefix}.{name}'] = getattr(submap, name)
    for name in _POINTS:
        arrays[f'{prefix}.{name}'] = getattr(cloud, name)
    keyframes = []
    for n, keyframe in enumerate(submap.keyframes):
        present = [*_VIEW, *(name for name in _OPTIONAL if getattr(keyframe, name) is not None)]
        for name in present:
            arrays[f'{prefix}.keyframe.{n}.{name}'] = getattr(keyframe, name)
        keyframes.append(
            {'frame_id': keyframe.frame_id, 'stamp_ns': keyframe.stamp_ns, 'arrays': present}
        )
    return {
        'key': submap.key,
        'path_length': submap.path_length,
        'voxel_size': submap.voxel_size,
        'keyframes': keyframes,
    }


def _pack_edges(backend: SubmapBackend, arrays: dict[str, np.ndarray]) -> list[dict]:
    rows = []
    lists = (backend.graph.edges, backend.arbiter.doubted, backend.arbiter.waiting)
    for state, edges in zip(_STATES, lists):
        for edge in edges:
            arrays[f'edge.{len(rows)}.measurement'] = edge.measurement
            arrays[f'edge.{len(rows)}.covariance'] = edge.covariance
            rows.append(
                {
                    'kind': edge.kind,
                    'keys': list(edge.keys),
                    'state': state,
                    'on_trial': edge.on_trial,
                    'times_off': edge.times_off,
                }
            )
    return rows


def load_map(backend: SubmapBackend, path: str | Path) -> None:
    """Fill an empty back end with a saved map, to go on mapping in it.

    The session must be reset: its next frame starts a submap, at an unknown place until a revisit
    is recognised.

    Raises:
        DataError: The file is missing, cut short, holds no map of this version, or one of another
            network.
        InputError: The back end holds a map already.

    """
    if backend.atlas.submaps:
        raise InputError('the back end holds a map already; load into a new one')
    content, arrays = _read(path)
    try:
        submaps = [_unpack_submap(row, arrays) for row in content['submaps']]
        edges = {state: [] for state in _STATES}
        for e, row in enumerate(content['edges']):
            edges[row['state']].append(
                Edge(
                    row['kind'],
                    tuple(row['keys']),
                    arrays[f'edge.{e}.measurement'],
                    arrays[f'edge.{e}.covariance'],
                    row['on_trial'],
                    row['times_off'],
                )
            )
        places = {
            name: {s.key: arrays[f'submap.{s.key}.{name}'] for s in submaps}
            for name in ('S_map_submap', 'S_odom_submap')
        }
        state = (content['next_key'], content['last_frame_id'], content.get('drift_factor', 1.0))
        network = content.get('network', '')
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{path}: the map in it is damaged ({error!r}); save it anew') from error
    if network and backend.network and network != backend.network:
        raise DataError(
            f'{path} was made with weights of SHA-256 {network[:12]}..., these have '
            f'{backend.network[:12]}...: its places cannot be recognised with them; run with the '
            'weights of the map, or begin a new one'
        )
    backend.restore(submaps, *places.values(), *edges.values(), *state)


def _read(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        with safe_open(path, 'np') as file:
            metadata = file.metadata() or {}
            if metadata.get('format') != FORMAT:
                raise DataError(f'{path} is a safetensors file but no {FORMAT}; give a saved map')
            if metadata.get('version') != VERSION:
                raise DataError(
                    f'{path} has map version {metadata.get("version")!r}, this software reads '
                    f'{VERSION!r}; use the software that wrote it'
                )
            content = json.loads(metadata['map'])
            return content, {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise DataError(f'cannot read {path}: {error.strerror or error}') from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f'{path} is no saved map, or is cut short ({error})') from error


def _unpack_submap(row: dict, arrays: dict[str, np.ndarray]) -> Submap:
    prefix = f'submap.{row["key"]}'
    submap = Submap(row['key'])
    submap.path_length = row['path_length']
    names = ('frame_ids', 'stamps_ns', 'T_submap_camera')
    ids, stamps, poses = (arrays[f'{prefix}.{name}'] for name in names)
    frames = list(zip(ids.tolist(), stamps.tolist(), poses, strict=True))
    cloud = MapCloud(*(arrays[f'{prefix}.{name}'] for name in _POINTS))
    submap.restore(frames, cloud, row['voxel_size'])
    for n, saved in enumerate(row['keyframes']):
        fields = {name: arrays[f'{prefix}.keyframe.{n}.{name}'] for name in saved['arrays']}
        submap.keyframes.append(Keyframe(saved['frame_id'], saved['stamp_ns'], **fields))
    return submap
