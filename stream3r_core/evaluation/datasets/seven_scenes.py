"""7-Scenes (Shotton et al. 2013): <scene>/seq-01/frame-000000.color.png, .pose.txt, .depth...

The published depth lives in the depth camera. Metrics need it projected into the colour camera
(``*.depth.proj.png``, as the reconstruction protocols use); without it there is no true depth.
"""

from functools import partial
from pathlib import Path

from stream3r_core.errors import DataError
from stream3r_core.evaluation.datasets.files import (
    file_frame,
    finite_pose,
    load_depth_png,
    numbered,
    read_matrices,
    read_text,
)
from stream3r_core.evaluation.datasets.frames import (
    MADE_UP_STAMPS,
    Clip,
    Dataset,
    made_up_stamps,
    pinhole,
)

K = pinhole(525, 525, 320, 240)
LAYOUT = '<scene>/seq-01/frame-000000.color.png with .pose.txt and .depth.proj.png'


def find(root: Path) -> list[str]:
    """Names <scene>/<sequence>."""
    return sorted(str(p.relative_to(root)) for p in root.glob('*/seq-*') if p.is_dir())


def find_test(root: Path) -> list[str]:
    """Names of the test split that each scene's TestSplit.txt lists."""
    names = []
    for split in sorted(root.glob('*/TestSplit.txt')):
        for line in read_text(split).split():
            digits = ''.join(filter(str.isdigit, line))
            if not digits:
                raise DataError(f'{split}: expected lines such as sequence3, got {line!r}')
            names.append(f'{split.parent.name}/seq-{int(digits):02d}')
    return names


def read(root: Path, name: str) -> Clip:
    """Read one sequence; depth above 10 m or below 1 mm is invalid, as in the protocols."""
    images = numbered(root / name, '*.color.png')
    remarks = [MADE_UP_STAMPS]
    depth = partial(load_depth_png, units_per_m=1000, invalid=65535, min_m=1e-3, max_m=10)
    has_depth = _beside(images[0], '.depth.proj.png').exists()
    if not has_depth:
        remarks.append('no *.depth.proj.png (depth in the colour camera): depth is not judged')
    frames = [
        file_frame(
            image,
            stamp,
            K=K,
            T_world_camera=finite_pose(read_matrices(_beside(image, '.pose.txt'))[0]),
            load_depth_m=partial(depth, _beside(image, '.depth.proj.png')) if has_depth else None,
        )
        for image, stamp in zip(images, made_up_stamps(len(images)))
    ]
    return Clip(name, tuple(frames), remarks=tuple(remarks))


def _beside(image: Path, suffix: str) -> Path:
    return image.with_name(image.name.removesuffix('.color.png') + suffix)


DATASET = Dataset(LAYOUT, find, read)
TEST_SPLIT = Dataset(LAYOUT + ', and <scene>/TestSplit.txt', find_test, read)
