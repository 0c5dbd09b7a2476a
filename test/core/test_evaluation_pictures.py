"""What the pictures and tables of a report show: the numbers behind them."""

import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stream3r_core.evaluation import pictures
from stream3r_core.evaluation.depth import depth_errors
from stream3r_core.evaluation.html import write_html
from stream3r_core.evaluation.pictures import (
    NAMES,
    Strip,
    View,
    dot_size,
    map_limits,
    strip_maps,
    views,
)
from stream3r_core.evaluation.reconstruction import map_errors
from stream3r_core.evaluation.report import Report
from stream3r_core.evaluation.trajectory import Trajectory, ate

OPTICAL_IN_Z_UP = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # looks along x, its y is down


def level_cameras(R_world_camera, positions):
    T = np.tile(np.eye(4), (len(positions), 1, 1))
    yaws = Rotation.from_euler('z', np.linspace(0, 1, len(positions))[:, None]).as_matrix()
    T[:, :3, :3] = yaws @ R_world_camera
    T[:, :3, 3] = positions
    return T


def test_the_top_view_looks_along_gravity_whatever_axis_it_has():
    path = np.stack([np.linspace(0, 1, 9), np.linspace(0, 5, 9), np.linspace(0, 9, 9)], axis=1)
    z_up = level_cameras(OPTICAL_IN_Z_UP, path)
    assert views(z_up) == (View(0, 1, False), View(1, 2, False))  # y is the longer one
    y_down = np.tile(np.eye(4), (9, 1, 1))
    y_down[:, :3, 3] = path
    assert views(y_down) == (View(0, 2, False), View(2, 1, True))


def test_no_view_is_upside_down_or_mirrored():
    """A walk that turns left and climbs does so in the pictures, whatever the world's axes."""
    left_and_up = np.array([[0.0, 0, 0], [2, 0, 0.1], [2, 1, 0.2]])
    z_up = level_cameras(OPTICAL_IN_Z_UP, left_and_up)
    for R in Rotation.create_group('O').as_matrix():  # every right-handed choice of axes
        T = np.eye(4)
        T[:3, :3] = R
        top, side = views(T @ z_up)
        forward, left = np.diff(drawn(top, T @ z_up), axis=0)
        assert np.linalg.det([forward, left]) > 0
        assert drawn(side, T @ z_up)[2, 1] > 0


def drawn(view, T_world_camera):
    """Positions [N, 2] on the page: to the right, upwards."""
    page = T_world_camera[:, :3, 3][:, [view.horizontal, view.vertical]]
    return page * [1, -1 if view.is_down else 1]


def figure_of(monkeypatch, draw, *arguments):
    """The matplotlib figure behind a picture."""
    monkeypatch.setattr(pictures, '_finished', lambda figure, caption: figure)
    return draw(*arguments)


def test_the_trajectory_picture_shows_truth_and_estimates_each_where_it_is(monkeypatch):
    path = np.random.default_rng(0).normal(0, 1, (9, 3)).cumsum(axis=0)
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, :3, 3] = path
    truth = Trajectory(None, poses)
    poses = poses.copy()
    poses[4, :3, 3] += 0.5
    errors = {a: ate(truth, Trajectory(None, poses), a) for a in ('se3', 'sim3')}
    figure = figure_of(monkeypatch, pictures.trajectory, errors)
    expected = {'truth': path} | {NAMES[a]: e.estimate.positions_m for a, e in errors.items()}
    for axis, view in zip(figure.axes, views(truth.T_world_camera)):
        lines = {line.get_label(): line for line in axis.lines}
        for name, xyz in expected.items():
            page = xyz[:, [view.horizontal, view.vertical]]
            np.testing.assert_array_equal(lines[name].get_xydata(), page)
        assert axis.yaxis_inverted() == view.is_down
        assert axis.get_ylabel() == f'{"xyz"[view.vertical]} (m)'


def test_the_map_picture_is_oriented_as_the_trajectory_is(monkeypatch):
    rng = np.random.default_rng(0)
    walls = rng.random((500, 3)) * [4, 2, 1]  # in a y-down world: the side shows most
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, 0, 3] = 1.0
    result = map_errors(walls, walls, 'none')
    figure = figure_of(monkeypatch, pictures.map_errors, result, poses)
    for axis in figure.axes[:2]:
        assert (axis.get_xlabel(), axis.get_ylabel()) == ('x (m)', 'y (m)')
        assert axis.yaxis_inverted()
        np.testing.assert_array_equal(axis.collections[0].get_offsets(), walls[:, :2])


def test_strips_show_the_aligned_prediction_and_no_error_where_there_is_no_truth():
    truth = np.array([[1.0, 2.0, 4.0], [0.0, 3.0, 5.0]])
    prediction = (truth - 0.5) / 2
    prediction[0, 2] = np.nan
    prediction[0, 1] += 0.1  # 0.2 m after alignment
    exact = depth_errors((truth - 0.5) / 2, truth, 'lstsq')
    shown, aligned, error = strip_maps(Strip('a', None, truth, prediction), exact)
    nan = np.nan
    np.testing.assert_allclose(shown, [[1, 2, 4], [nan, 3, 5]])
    np.testing.assert_allclose(aligned, [[1, 2.2, nan], [0, 3, 5]], atol=1e-5)
    np.testing.assert_allclose(error, [[0, 0.1, nan], [nan, 0, 0]], atol=1e-5)


def test_a_map_that_lies_far_from_the_true_one_is_in_the_picture_all_the_same():
    truth = np.random.default_rng(0).random((1000, 3))
    near, far = map_limits(truth, truth + 0.01), map_limits(truth, truth + 5)
    assert (near[0] > -0.2).all() and (near[1] < 1.2).all()
    assert (far[0] == near[0]).all() and (far[1] > 5.9).all()


def test_dots_grow_where_points_are_few():
    assert dot_size(200) > dot_size(20_000) > dot_size(2_000_000) == pytest.approx(0.4)


def test_a_row_of_the_page_has_its_unit_and_stands_under_its_alignment(tmp_path):
    report = Report('input', {}, {})
    report.add('trajectory', 'ATE RMSE', 0.25, 'm', 'SE(3)', '/truth')
    report.add('trajectory', 'ATE RMSE', 0.125, 'm', 'Sim(3)', '/truth')
    report.add('trajectory', 'associated poses', 7, 'poses', '', '/truth')
    write_html(tmp_path / 'report.html', report, [])
    page = (tmp_path / 'report.html').read_text()
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in page.split('<tr>')]
    assert ['metric', 'unit', 'unaligned', 'SE(3)', 'Sim(3)'] in rows
    assert ['ATE RMSE', 'm', '', '0.25', '0.125'] in rows
    assert ['associated poses', 'poses', '7', '', ''] in rows
    assert '<h3>against /truth</h3>' in page
