"""What the design page shows of the back end runs as it stands there."""

import re
from pathlib import Path

import numpy as np
from backend_walks import ate

import stream3r_core.backend

PAGE = Path(stream3r_core.backend.__file__).parent / 'DESIGN.md'


def test_the_example_of_the_design_page_closes_its_loops(capsys):
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    names = {'__name__': 'example'}
    exec(compile(code, str(PAGE), 'exec'), names)
    truth = names['walk'].T_world_camera
    np.testing.assert_array_equal(names['frame_ids'], np.arange(len(truth)))
    without = ate(names['backend'].trajectory(corrected=False)[2], truth)
    assert ate(names['T_map_camera'], truth) < 0.6 * without
    said = capsys.readouterr().out.split()
    assert int(said[0]) > 3 and int(said[2]) == len(names['cloud']) > 1000
