"""Places: brute force and the graph search agree, the recent past and look-alikes are left out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stream3r_core.backend.config import PlaceConfig
from stream3r_core.backend.places import PlaceIndex
from stream3r_core.errors import InputError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]
OPEN = PlaceConfig(min_similarity=-1.0)


def unit(rng, *shape):
    v = rng.standard_normal(shape).astype(np.float32)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def order(count):
    return {k: k for k in range(count)}


def filled(vectors, per_submap, config):
    index = PlaceIndex(config)
    for n, vector in enumerate(vectors):
        index.add(n // per_submap, n, vector)
    return index


def test_a_revisit_is_found_and_the_recent_past_is_not():
    rng = np.random.default_rng(0)
    vectors = unit(rng, 100, 64)
    index = filled(vectors, 10, PlaceConfig())
    found = index.search(vectors[23] + 0.02 * unit(rng, 64), 9, order(10))
    assert [(p.submap, p.frame_id) for p in found] == [(2, 23)] and found[0].similarity > 0.99
    assert index.search(vectors[73], 9, order(10)) == []  # two submaps ago
    assert index.search(vectors[63], 9, order(10))[0].frame_id == 63
    assert index.search(unit(rng, 64), 9, order(10)) == []  # resembles nothing


def test_each_submap_proposes_its_best_frame_most_similar_first():
    rng = np.random.default_rng(1)
    place = unit(rng, 64)
    index = filled(unit(rng, 60, 64), 20, PlaceConfig(max_candidates=2))  # other places
    noise = {(0, 0): 0.5, (0, 1): 0.1, (1, 2): 0.3, (2, 3): 0.4}
    for (submap, frame), amount in noise.items():
        vector = place + amount * unit(rng, 64)
        index.add(submap, 100 + frame, vector / np.linalg.norm(vector))
    found = index.search(place, 9, order(10))
    assert [p.frame_id for p in found] == [101, 102]


def test_what_all_descriptors_share_tells_nothing():
    rng = np.random.default_rng(4)
    shared = 3 * unit(rng, 64)
    vectors = shared + unit(rng, 90, 64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = filled(vectors, 10, PlaceConfig(max_candidates=9))
    assert np.quantile(vectors @ vectors[23], 0.1) > 0.8  # all are alike
    found = index.search(vectors[23], 9, order(10))
    assert [p.frame_id for p in found] == [23] and found[0].similarity > 0.99
    other = shared + unit(rng, 64)
    assert index.search(other / np.linalg.norm(other), 9, order(10)) == []


def test_two_far_places_that_look_alike_are_no_revisit():
    rng = np.random.default_rng(2)
    place = unit(rng, 64)
    index = filled(unit(rng, 60, 64), 6, PlaceConfig(ratio=1.1))  # other places
    for frame, submap in enumerate((0, 1, 8)):
        index.add(submap, 100 + frame, place + 0.01 * unit(rng, 64))
    assert index.search(place, 20, order(21)) == []
    index.keep(np.arange(63) < 62)  # neighbours may look alike
    assert len(index.search(place, 20, order(21))) == 2


def test_the_graph_search_finds_what_brute_force_finds():
    pytest.importorskip('faiss', reason='extra "backend" is not installed')
    rng = np.random.default_rng(3)
    vectors = unit(rng, 3000, 32)
    brute = filled(vectors, 10, PlaceConfig(min_similarity=-1.0, max_candidates=1))
    graph = filled(vectors[:2000], 10, PlaceConfig(-1.0, max_candidates=1, brute_force_below=500))
    assert graph.search(vectors[7], 299, order(300))[0].frame_id == 7
    for n in range(2000, 3000):  # rows that come after the first search
        graph.add(n // 10, n, vectors[n])
    agree = 0
    for query in unit(rng, 100, 32):
        a, b = (index.search(query, 299, order(300)) for index in (brute, graph))
        agree += a == b
    assert agree >= 97


def test_forgotten_frames_are_not_found_and_folded_ones_move():
    rng = np.random.default_rng(4)
    vectors = unit(rng, 60, 32)
    index = filled(vectors, 10, OPEN)
    index.keep_frames(range(0, 60, 2))
    assert len(index) == 30
    index.rename(2, 1)
    place = index.search(vectors[24], 9, order(10))[0]
    assert (place.submap, place.frame_id) == (1, 24)
    assert index.search(vectors[25], 9, order(10))[0].similarity < 0.9


def test_an_index_that_forgot_everything_or_never_knew_anything_begins_anew():
    index = PlaceIndex(OPEN)
    for count in (0, 1):  # of keyframes that are forgotten
        for n in range(count):
            index.add(0, n, np.eye(4)[n])
        index.keep_frames(())
        assert len(index) == 0 and index.search(np.eye(4)[0], 9, order(10)) == []
    index.add(1, 7, np.eye(4)[2])
    index.add(2, 8, np.eye(4)[3])
    assert index.search(np.eye(4)[2], 9, order(10))[0].frame_id == 7


def test_descriptors_of_another_network_are_refused():
    index = PlaceIndex()
    index.add(0, 0, np.ones(8) / np.sqrt(8))
    with pytest.raises(InputError, match=r'descriptor \[8\] as before, got \[9\]'):
        index.add(0, 1, np.ones(9) / 3)
    with pytest.raises(InputError, match=r'descriptor \[8\] as before, got \[9\]'):
        index.search(np.ones(9) / 3, 0, order(1))
    with pytest.raises(InputError, match='finite'):
        index.add(0, 1, np.full(8, np.nan))


def test_optional_packages_load_late_and_their_absence_is_explained():
    code = (
        'import sys; sys.modules["faiss"] = None; sys.modules["gtsam"] = None\n'
        'from stream3r_core.backend import backend, map_file, worker, places, factors\n'
        'from stream3r_core.errors import MissingDependencyError\n'
        'for load in (places.load_faiss, factors.load_gtsam, backend.SubmapBackend):\n'
        '    try:\n        load()\n'
        '    except MissingDependencyError as error:\n        print(error)\n'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert 'faiss' in lines[0] and 'GTSAM' in lines[1] and 'GTSAM' in lines[2]
    assert issubclass(MissingDependencyError, Exception)
