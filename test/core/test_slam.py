"""Sessions that restart into submaps: SLAM without ROS, with a network's own interface."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from backend_walks import ate
from safetensors.numpy import load as load_bytes
from safetensors.numpy import load_file as load
from scripted_walks import FRAMES, config, returning_walk, scripted

from stream3r_core.backend import sim3
from stream3r_core.backend.map_file import pack_map
from stream3r_core.backend.network import NetworkWitness
from stream3r_core.backend.submap import NO_STAMP
from stream3r_core.checkpoints import load_model
from stream3r_core.config import CoreConfig, from_dict
from stream3r_core.errors import ConfigError, DataError, InputError
from stream3r_core.pipeline import Reconstructor
from stream3r_core.slam import SubmapReconstructor, make_reconstructor
from stream3r_core.synthetic.front_end import SimulatedFrontEnd, make_walk
from stream3r_core.synthetic.scripted import SIZE_HW, scripted_image


@pytest.fixture(scope='module')
def walk():
    return returning_walk()


def run(walk, options, in_background=False, frames=None):
    mapper = make_reconstructor(scripted(walk), options, in_background)
    predictions = [
        mapper.feed(scripted_image(i), int(walk.stamps_ns[i]))[0]
        for i in (frames or range(len(walk.stamps_ns)))
    ]
    mapper.flush()
    return mapper, predictions


@pytest.fixture(scope='module')
def closed(walk):
    return run(walk, config())


def test_a_walk_that_comes_home_closes_its_loop(walk, closed):
    mapper, predictions = closed
    stamps, poses = mapper.trajectory()
    np.testing.assert_array_equal(stamps, walk.stamps_ns)
    without = ate(mapper.trajectory(corrected=False)[1], walk.T_world_camera)
    assert mapper.backend.num_loops > 3 and mapper.num_moves > 0
    assert ate(poses, walk.T_world_camera) < 0.4 * without
    assert len(mapper.backend.graph) > 4
    online = np.array([p.T_world_camera.numpy() for p in predictions])
    np.testing.assert_allclose(online[-1], poses[-1], atol=0.05)  # the last ones came after it


def true_depth(walk, frame):
    front_end = SimulatedFrontEnd(walk, 0, size_hw=SIZE_HW)
    depth = front_end.hall.depth(walk.T_world_camera[frame], front_end.K, SIZE_HW)
    return np.median(depth[depth > 0])


def test_predictions_lie_in_the_map_in_its_unit(walk, closed):
    mapper, predictions = closed
    _, poses = mapper.trajectory()
    first = predictions[0].depth
    unit = float(first[first > 0].median() / true_depth(walk, 0))
    for index in (0, 30, len(poses) - 1):
        prediction = predictions[index]
        depth = prediction.depth[prediction.depth > 0].median()
        assert float(depth / true_depth(walk, index)) / unit == pytest.approx(1, abs=0.12)


def test_the_same_images_give_the_same_map_also_with_a_thread(walk, closed):
    again, _ = run(walk, config())
    np.testing.assert_array_equal(again.trajectory()[1], closed[0].trajectory()[1])
    np.testing.assert_array_equal(again.map.points().points_xyz, closed[0].map.points().points_xyz)
    threaded, _ = run(walk, config(), in_background=True)
    np.testing.assert_allclose(threaded.trajectory()[1], again.trajectory()[1], atol=1e-9)
    threaded.close()


@pytest.mark.parametrize('in_background', [False, True])
def test_a_back_end_without_gpu_memory_skips_revisits_and_finds_later_ones(
    walk, closed, in_background, monkeypatch, caplog
):
    """Its thread lives on: neither poses nor map are lost, and the log has an end."""
    network, asked = scripted(walk), Counter()

    def without_room(name, error, ask, last):
        def answer(*args, **kwargs):
            asked[name] += 1
            if asked[name] <= last:
                raise error
            return ask(*args, **kwargs)

        return answer

    no_room = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    alloc = RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`')
    monkeypatch.setattr(network, 'descriptor', without_room('d', alloc, network.descriptor, 5))
    monkeypatch.setattr(network, 'forward', without_room('p', no_room, network.forward, 3))
    mapper = SubmapReconstructor(network, config(), in_background)
    for i, stamp_ns in enumerate(walk.stamps_ns):
        mapper.feed(scripted_image(i), int(stamp_ns))
    mapper.flush()
    assert mapper.figures()['backend_out_of_memory'] == 8
    assert len(mapper.trajectory()[0]) == len(walk.stamps_ns)
    assert mapper.map.num_points == pytest.approx(closed[0].map.num_points, rel=0.1)
    assert 0 < mapper.backend.num_loops < closed[0].backend.num_loops
    told = [record for record in caplog.records if 'GPU memory' in record.getMessage()]
    assert len(told) == 4  # after 1, 2, 4 and 8
    mapper.close()


def test_an_error_that_is_none_of_memory_still_ends_the_back_end(walk, monkeypatch):
    network = scripted(walk)
    fault = RuntimeError('CUDA error: an illegal memory access was encountered')
    monkeypatch.setattr(network, 'descriptor', lambda *_: (_ for _ in ()).throw(fault))
    mapper = SubmapReconstructor(network, config())
    with pytest.raises(RuntimeError, match='illegal memory access'):
        mapper.feed(scripted_image(0), 1)


def test_every_frame_of_every_submap_is_refined(walk):
    mapper, seen = make_reconstructor(scripted(walk), config()), []

    class Moving:
        def figures(self):
            return {'images_unaligned': 7}

        def refine(self, prediction):
            seen.append(prediction.index)
            T = prediction.T_world_camera.clone()
            T[2, 3] += 100
            return dataclasses.replace(prediction, T_world_camera=T)

    plain = make_reconstructor(scripted(walk), config())
    mapper._refiner = Moving()
    for i in range(20):
        image = scripted_image(i), int(walk.stamps_ns[i])
        (moved,), (stated,) = mapper.feed(*image), plain.feed(*image)
        if i < FRAMES:  # of the first submap, which lies where its session says
            torch.testing.assert_close(
                moved.T_world_camera[2, 3], stated.T_world_camera[2, 3] + 100, atol=1e-3, rtol=0
            )
    assert seen.count(0) == 2 and len(seen) > 20  # the overlap is seen again
    assert mapper.figures()['images_unaligned'] == 7


def test_without_a_back_end_nothing_changes(walk):
    mapper = make_reconstructor(scripted(walk), config('none'))
    assert type(mapper) is Reconstructor


def test_a_saved_map_is_gone_on_in_and_found_again(walk, closed, tmp_path):
    first, _ = run(walk, config(), frames=range(60))
    (tmp_path / 'map.safetensors').write_bytes(first.pack())
    later = config(load=str(tmp_path / 'map.safetensors'))
    count = first.backend.next_key
    second, _ = run(walk, later, frames=range(20, 70))
    stamps, poses = second.trajectory()
    assert second.backend.num_loops > 0 and second.backend.next_key > count
    np.testing.assert_array_equal(stamps, walk.stamps_ns[20:70])  # of this run only
    mapped = first.trajectory()[1][:, :3, 3]
    relocalised = np.linalg.norm(poses[:40, :3, 3] - mapped[20:60], axis=1)
    way = np.linalg.norm(np.diff(mapped, axis=0), axis=1).sum()
    assert np.median(relocalised) < 0.03 * way
    with pytest.raises(DataError, match='cannot read'):
        run(walk, config(load=str(tmp_path / 'none')), frames=range(1))


@pytest.fixture(scope='module')
def map_file(walk, tmp_path_factory):
    """The map of the first round."""
    path = tmp_path_factory.mktemp('map') / 'map.safetensors'
    mapper, _ = run(walk, config(), frames=range(60))
    path.write_bytes(mapper.pack())
    return path


def test_a_map_of_another_network_or_image_size_is_one_clear_error(walk, map_file, tmp_path):
    network = scripted(walk)
    network.descriptor = lambda images: torch.ones(*images.shape[:2], 9) / 3
    with pytest.raises(DataError, match='described by 256 numbers, this network gives 9'):
        make_reconstructor(network, config(load=str(map_file)))
    other, _ = run(walk, config(), frames=range(20))
    for submap in other.backend.atlas.submaps.values():
        larger = np.zeros((56, 70, 3), np.uint8)
        submap.keyframes = [dataclasses.replace(k, image_rgb=larger) for k in submap.keyframes]
    (tmp_path / 'larger.map').write_bytes(other.pack())
    mapper = make_reconstructor(scripted(walk), config(load=str(tmp_path / 'larger.map')))
    for frame in range(20):
        with pytest.raises(InputError, match=r'with 64 x 48 pixels, those of .* with 70 x 56'):
            mapper.feed(scripted_image(frame))
    assert len(mapper.trajectory()[0]) == 0


@pytest.mark.parametrize('in_background', [False, True])
def test_a_robot_localises_in_a_map_that_stays_as_it_is(walk, map_file, in_background):
    options = config(load=str(map_file), localize_only=True)
    mapper = make_reconstructor(scripted(walk, seed=3), options, in_background)
    mapped = load(map_file)
    before, told = {name: array.copy() for name, array in mapped.items()}, {}
    for frame in range(15, 60):
        try:
            told[frame] = mapper.feed(scripted_image(frame), int(walk.stamps_ns[frame]))[0]
        except InputError as error:
            assert 'not found in' in str(error) and 'map.safetensors' in str(error)
        if in_background:
            mapper.flush()
    assert mapper.figures()['localized'] == 1 and mapper.backend.num_loops > 3
    assert min(told) < 32, 'it takes one submap or two until the place is known'
    numbers, _, truth = mapped_poses(mapper)
    where = {frame: T for frame, T in zip(numbers, truth)}
    way = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()
    off = [np.linalg.norm((p.T_world_camera.numpy() - where[f])[:3, 3]) for f, p in told.items()]
    assert np.median(off) < 0.03 * way and max(off) < 0.1 * way
    stamps, poses = mapper.trajectory()  # also of the images before the place was known
    np.testing.assert_array_equal(stamps, walk.stamps_ns[15:60])
    off = np.linalg.norm(poses[:, :3, 3] - truth[15:60, :3, 3], axis=1)
    assert np.median(off) < 0.03 * way
    assert mapper.pack() is None
    after = load_bytes(pack_map(mapper.backend))
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    mapper.reset()
    assert mapper.figures()['localized'] == 0 and mapper.figures()['submaps'] > 1
    mapper.close()


def mapped_poses(mapper):
    return mapper.backend.atlas.trajectory()


def test_a_robot_that_is_carried_off_finds_its_place_again(walk, map_file):
    mapper = make_reconstructor(
        scripted(walk, seed=4), config(load=str(map_file), localize_only=True)
    )
    told = {}
    for frame in (*range(5, 21), *range(35, 60)):  # a pause in which it was carried
        stamp = int(walk.stamps_ns[frame]) + (10**10 if frame > 30 else 0)
        try:
            told[frame] = mapper.feed(scripted_image(frame), stamp)[0].T_world_camera.numpy()
        except InputError:
            continue
    truth = mapped_poses(mapper)[2]
    way = np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()
    off = [np.linalg.norm((told[frame] - truth[frame])[:3, 3]) for frame in range(52, 60)]
    assert max(off) < 0.06 * way


def test_an_unknown_place_is_told_nowhere(walk, map_file):
    elsewhere = make_walk('spiral', 5, size_m=3.0)
    mapper = make_reconstructor(
        scripted(elsewhere), config(load=str(map_file), localize_only=True)
    )
    for frame in range(700, 740):
        with pytest.raises(InputError, match='not found in'):
            mapper.feed(scripted_image(frame), int(elsewhere.stamps_ns[frame]))
    assert len(mapper.trajectory()[0]) == 0 and mapper.num_moves == 0
    with pytest.raises(ConfigError, match=r'set backend\.load'):
        make_reconstructor(scripted(walk), config(localize_only=True))


def test_a_pause_begins_a_submap_without_overlap(walk):
    mapper = make_reconstructor(scripted(walk), config())
    for i in range(10):
        mapper.feed(scripted_image(i), i * 10**8)
    mapper.feed(scripted_image(11), 10**10)
    joints = mapper.backend.graph.edges
    assert len(mapper.backend.graph) == 2 and len(joints) == 2
    assert len(mapper.trajectory()[0]) == 11


def test_a_pose_that_is_not_finite_costs_one_image(walk):
    network = scripted(walk)
    mapper = make_reconstructor(network, config())
    for i in range(6):
        mapper.feed(scripted_image(i))
    network.fails = True
    with pytest.raises(InputError, match='no finite pose'):
        mapper.feed(scripted_image(6))
    network.fails = False
    mapper.feed(scripted_image(7))
    stamps, poses = mapper.trajectory()
    assert len(poses) == 7 and np.isfinite(poses).all() and (stamps == NO_STAMP).all()


@pytest.mark.parametrize('in_background', [False, True])
def test_a_reset_begins_an_empty_map(walk, in_background):
    mapper = make_reconstructor(scripted(walk), config(), in_background)
    for _ in range(2):
        for i in range(30):
            mapper.feed(scripted_image(i), int(walk.stamps_ns[i]))
        mapper.flush()
        assert len(mapper.trajectory()[0]) == 30 and mapper.map.num_points > 100
        mapper.reset()
        assert mapper.map.num_points == 0 and len(mapper.trajectory()[0]) == 0
    mapper.close()


def test_options_that_do_not_go_together_are_refused(walk):
    stac = {'session': {'mode': 'stac'}, 'cache': {'chunk_size': 2}}
    chunks = from_dict(CoreConfig, {'backend': {'kind': 'submaps'}, **stac})
    with pytest.raises(ConfigError, match='frame by frame'):
        SubmapReconstructor(load_model('tiny', 'random'), chunks)
    with pytest.raises(ConfigError, match='keep_images'):
        make_reconstructor(scripted(walk), config(keyframes={'keep_images': False}))


def test_the_network_sees_pairs_as_a_batch_sees_them():
    model = load_model('tiny', 'random')
    witness, rng = NetworkWitness(model), np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    keyframes = [dataclasses.make_dataclass('K', ['image_rgb'])(image) for image in images]
    pairs = witness.predict_pairs([(keyframes[0], keyframes[2]), (keyframes[1], keyframes[2])])
    for (first, second), pair in zip([(0, 2), (1, 2)], pairs):
        batch = torch.from_numpy(images[[first, second]]).permute(0, 3, 1, 2)[None] / 255
        with torch.inference_mode():
            raw = model(batch, mode='full', outputs=('depth',))
        for view in (0, 1):
            np.testing.assert_allclose(pair[view].depth, raw['depth'][0, view, ..., 0], rtol=1e-4)
            np.testing.assert_allclose(
                sim3.inverse(pair[view].T_pair_camera.astype(float))[:3, 3],
                raw['pose_enc'][0, view, :3], atol=1e-4,
            )  # fmt: skip
    described = witness.describe(images[0])
    assert np.linalg.norm(described) == pytest.approx(1, abs=1e-5)
