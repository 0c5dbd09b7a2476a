"""Exports: other programs' files, read back, put every point where it was seen."""

import dataclasses
import html
import sys

import numpy as np
import pytest
import trimesh
from oracle import Oracle, room_clip
from scipy.spatial.transform import Rotation

from stream3r_core.errors import ConfigError, DataError, MissingDependencyError
from stream3r_core.evaluation.config import EvaluationConfig
from stream3r_core.evaluation.exports import Camera, write_colmap, write_glb, write_rerun
from stream3r_core.evaluation.run import evaluate
from stream3r_core.mapping import MapCloud

SIZE = (48, 64)


def views(number=5):
    rng = np.random.default_rng(0)
    K = np.array([[50.0, 0, 31.5], [0, 52.0, 23.0], [0, 0, 1]])
    cameras = []
    for i in range(number):
        T = np.eye(4)
        T[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.3, 3)).as_matrix()
        T[:3, 3] = rng.normal(0, 1, 3)
        cameras.append(Camera(f'image{i}.png', i * 10**8, T, K, SIZE))
    return cameras


def cloud(number=100):
    rng = np.random.default_rng(1)
    return MapCloud(
        rng.normal(0, 2, (number, 3)).astype(np.float32),
        rng.integers(0, 256, (number, 3), dtype=np.uint8),
        np.ones(number, np.float32),
    )


def colmap_projection(folder, number, point):
    """Pixel of a world point, from nothing but the COLMAP files (centre of pixel 0 at 0.5)."""
    images = [r for r in (folder / 'images.txt').read_text().split('\n')[::2] if r]
    fields = images[number].split()
    w, x, y, z, *t = map(float, fields[1:8])
    camera = (folder / 'cameras.txt').read_text().splitlines()[int(fields[8]) - 1].split()
    assert camera[1] == 'PINHOLE' and [int(v) for v in camera[2:4]] == [SIZE[1], SIZE[0]]
    fx, fy, cx, cy = map(float, camera[4:])
    X = Rotation.from_quat([x, y, z, w]).apply(point) + t
    return np.array([fx * X[0] / X[2] + cx, fy * X[1] / X[2] + cy]) - 0.5


def test_the_colmap_model_projects_points_as_the_cameras_do(tmp_path):
    write_colmap(tmp_path, views(), cloud())
    for number, camera in enumerate(views()):
        point = camera.T_world_camera @ [0.2, -0.3, 2.0, 1.0]
        u, v, w = camera.K @ [0.2, -0.3, 2.0]
        pixel = colmap_projection(tmp_path, number, point[:3])
        np.testing.assert_allclose(pixel, [u / w, v / w], atol=1e-9)
    points = np.loadtxt(tmp_path / 'points3D.txt')
    np.testing.assert_allclose(points[:, 1:4], cloud().points_xyz, rtol=1e-5)
    assert np.array_equal(points[:, 4:7], cloud().colors_rgb)


@pytest.mark.parametrize('name', ['image 0.png', 'image1.png'])
def test_names_that_colmap_would_cut_or_mix_up_are_refused(tmp_path, name):
    cameras = views()
    cameras[0] = dataclasses.replace(cameras[0], name=name)
    with pytest.raises(DataError, match=f'{name}.*rename'):
        write_colmap(tmp_path, cameras, cloud())


def test_colmap_itself_reads_the_model(tmp_path):
    pycolmap = pytest.importorskip('pycolmap', reason='needs pycolmap: pip install pycolmap')
    write_colmap(tmp_path, views(), cloud())
    model = pycolmap.Reconstruction(tmp_path)
    assert (model.num_images(), model.num_cameras(), model.num_points3D()) == (5, 5, 100)
    for number, camera in enumerate(views(), 1):
        centre = model.images[number].projection_center()
        np.testing.assert_allclose(centre, camera.T_world_camera[:3, 3], atol=1e-9)


def test_the_glb_scene_has_the_cloud_and_a_frustum_per_camera_upright(tmp_path):
    write_glb(tmp_path / 'map.glb', views(), cloud())
    scene = trimesh.load(tmp_path / 'map.glb')
    points = scene.geometry['map']
    upright = cloud().points_xyz * [1, -1, -1]  # OpenCV looks along +z with y down
    np.testing.assert_allclose(np.sort(points.vertices, 0), np.sort(upright, 0), atol=1e-5)
    assert np.array_equal(np.sort(points.colors[:, :3], 0), np.sort(cloud().colors_rgb, 0))
    lines = scene.geometry['cameras'].vertices
    for camera in views():
        centre = camera.T_world_camera[:3, 3] * [1, -1, -1]
        assert np.linalg.norm(lines - centre, axis=1).min() < 1e-5


def test_long_runs_show_a_bounded_number_of_frusta(tmp_path):
    write_glb(tmp_path / 'few.glb', views(300), cloud())
    write_glb(tmp_path / 'many.glb', views(3000), cloud())
    few, many = ((tmp_path / f'{n}.glb').stat().st_size for n in ('few', 'many'))
    assert many < 1.1 * few


def test_an_empty_map_and_no_cameras(tmp_path):
    write_glb(tmp_path / 'cameras.glb', views(), cloud(0))
    assert set(trimesh.load(tmp_path / 'cameras.glb').geometry) == {'cameras'}
    with pytest.raises(DataError, match='no camera'):
        write_colmap(tmp_path, [], cloud())


def test_the_rerun_recording_is_written(tmp_path):
    pytest.importorskip('rerun', reason="needs Rerun: pip install 'stream3r_ros[rerun]'")
    write_rerun(tmp_path / 'run.rrd', views(), cloud())
    assert (tmp_path / 'run.rrd').read_bytes()[:4] == b'RRF2'


def test_a_reader_of_the_rerun_recording_finds_cameras_and_map_where_they_are(tmp_path):
    chunk = pytest.importorskip('rerun.chunk', reason='needs a rerun-sdk that reads recordings')
    write_rerun(tmp_path / 'run.rrd', views(), cloud())
    found = {}
    for part in chunk.RrdReader(tmp_path / 'run.rrd').stream():
        batch = part.to_record_batch()
        found |= {f'{part.entity_path} {n}': batch[n].to_pylist() for n in batch.schema.names}
    for index, camera in enumerate(views()):
        columns = np.reshape(found['/world/camera Transform3D:mat3x3'][index], (3, 3))
        position = found['/world/camera Transform3D:translation'][index][0]
        np.testing.assert_allclose(columns.T, camera.T_world_camera[:3, :3], atol=1e-6)
        np.testing.assert_allclose(position, camera.T_world_camera[:3, 3], rtol=1e-6)
    (points,) = found['/world/map Points3D:positions']
    np.testing.assert_array_equal(np.array(points, np.float32), cloud().points_xyz)


@pytest.mark.parametrize('package, write', [('trimesh', write_glb), ('rerun', write_rerun)])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package, write):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match='pip install'):
        write(tmp_path / 'file', views(), cloud())


def test_an_evaluation_writes_the_exports_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'rerun', None)
    clip = room_clip(num_frames=4)
    config = EvaluationConfig(icp='none', pictures=False, exports=('pcd', 'colmap', 'glb', 'rrd'))
    report = evaluate(clip, Oracle(clip), tmp_path, config)
    assert (tmp_path / 'map.pcd').exists() and (tmp_path / 'map.glb').exists()
    assert len((tmp_path / 'colmap/cameras.txt').read_text().splitlines()) == 4
    (skipped,) = (s for s in report.skipped if s.group == 'exports')
    assert skipped.package == 'rerun' and 'pip install' in skipped.reason
    assert skipped.reason in html.unescape((tmp_path / 'report.html').read_text())
    with pytest.raises(ConfigError, match='pcd, colmap, glb, rrd'):
        EvaluationConfig(exports=('stl',))
