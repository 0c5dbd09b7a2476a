"""What the pictures and tables of a report show: the numbers behind them."""

import re

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stream3r_core.evaluation.depth import depth_errors
from stream3r_core.evaluation.html import write_html
from stream3r_core.evaluation.pictures import Strip, dot_size, map_limits, strip_maps, views
from stream3r_core.evaluation.report import Report

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
    assert views(z_up) == ((0, 1), (1, 2))  # y is the longer one of the ground
    y_down = np.tile(np.eye(4), (9, 1, 1))
    y_down[:, :3, 3] = path
    assert views(y_down) == ((0, 2), (2, 1))


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
