from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stream3r_core.config import PRESETS, ImageConfig, ModelConfig
from stream3r_core.errors import ConfigError, DataError, InputError
from stream3r_core.image import (
    MAX_SIDE,
    ImageGeometry,
    list_photos,
    load_photo,
    load_photos,
    prepare,
    prepare_photos,
)

GOLDEN = Path(__file__).parents[1] / 'golden' / 'preprocess.safetensors'
PUBLISHED, SMALL = PRESETS['stream3r'], ModelConfig(img_size=112, patch_size=8)
SQUARE = (518, 518)
SIZES = {  # camera (width, height): network (height, width) of crop, pad, eval
    (640, 480): ((392, 518), SQUARE, (378, 518)),
    (480, 640): (SQUARE, SQUARE, (518, 378)),
    (1920, 1080): ((294, 518), SQUARE, (280, 518)),
    (1024, 436): ((224, 518), SQUARE, (210, 518)),
    (1216, 352): ((154, 518), SQUARE, (140, 518)),
    (518, 392): ((392, 518), SQUARE, (392, 518)),
    (1280, 720): ((294, 518), SQUARE, (280, 518)),
    (1242, 375): ((154, 518), SQUARE, (154, 518)),
    (4032, 3024): ((392, 518), SQUARE, (378, 518)),
    (3024, 4032): (SQUARE, SQUARE, (518, 378)),
    (848, 480): ((294, 518), SQUARE, (280, 518)),
}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize('fit', ['crop', 'pad'])
@pytest.mark.parametrize('name', ['a', 'b', 'c', 'd', 'e'])  # RGB three times, RGBA, mono
def test_prepared_pixels_equal_the_golden_loader(golden, name, fit):
    tensor, geometry = prepare(golden[f'{name}.input'].numpy(), ImageConfig(fit=fit), PUBLISHED)
    assert torch.equal(tensor[:, ::19, ::19], golden[f'{name}.{fit}.stride19'])
    assert tensor.shape[1:] == geometry.network_size_hw and tensor.is_contiguous()


def test_photos_of_mixed_sizes_are_padded_as_the_golden_loader_does(golden):
    photos = [golden['a.input'], golden['c.input']]
    batch, geometries = prepare_photos(photos, ImageConfig(), PUBLISHED)
    assert torch.equal(batch[..., ::19, ::19], golden['mixed.a_c.stride19'])
    top = geometries[1].offset_xy[1]
    alone, _ = prepare(photos[1], ImageConfig(), PUBLISHED)
    assert top == 49 and torch.equal(batch[1, :, top : top + alone.shape[1]], alone)


@pytest.mark.parametrize('camera_wh', SIZES)
def test_network_sizes_equal_the_published_table(camera_wh):
    image = np.zeros((camera_wh[1], camera_wh[0]), np.uint8)
    prepared = {
        fit: prepare(image, ImageConfig(fit=fit), PUBLISHED) for fit in ('crop', 'pad', 'eval')
    }
    assert tuple(g.network_size_hw for _, g in prepared.values()) == SIZES[camera_wh]
    assert all(tuple(t.shape[1:]) == g.network_size_hw for t, g in prepared.values())


def test_halves_of_a_patch_round_to_the_even_multiple():
    def rows(height):
        return prepare(noise(height, 112), ImageConfig(), SMALL)[0].shape[1]

    assert (rows(76), rows(84), rows(92)) == (80, 80, 96)  # 9.5, 10.5 and 11.5 patches of 8


def test_the_evaluation_loader_resizes_twice_with_lanczos():
    image = noise(436, 1024)
    twice = Image.fromarray(image).resize((518, 221), Image.Resampling.LANCZOS)
    twice = np.asarray(twice.resize((518, 210), Image.Resampling.LANCZOS))
    tensor, _ = prepare(image, ImageConfig(fit='eval'), PUBLISHED)
    assert np.array_equal((tensor.permute(1, 2, 0) * 255).round().byte().numpy(), twice)


def test_every_kind_of_input_gives_the_same_pixels():
    image = noise(60, 80)
    expected, geometry = prepare(image, ImageConfig(), SMALL)
    as_float = image / np.float32(255)
    opaque = np.dstack([image, np.full((60, 80, 1), 255, np.uint8)])
    for same in (
        as_float,
        as_float.astype(np.float64),
        torch.from_numpy(image),
        torch.from_numpy(as_float),
        opaque,
        image[::-1, ::-1].copy()[::-1, ::-1],  # negative strides
    ):
        tensor, other = prepare(same, ImageConfig(), SMALL)
        assert torch.equal(tensor, expected) and other == geometry
    mono, _ = prepare(image[..., 0], ImageConfig(), SMALL)
    assert torch.equal(mono, expected[:1].expand_as(mono))
    transparent, _ = prepare(np.zeros((60, 80, 4), np.uint8), ImageConfig(), SMALL)
    assert (transparent == 1).all()


def test_long_side_and_patch_size_are_free():
    for patch, long_side in ((8, 160), (14, 224), (16, 64)):
        model = ModelConfig(patch_size=patch)
        for fit in ('crop', 'pad', 'eval'):
            tensor, _ = prepare(noise(77, 131), ImageConfig(long_side, fit), model)
            assert tensor.shape[2] == long_side and tensor.shape[1] % patch == 0


@pytest.mark.parametrize(
    'image, reason',
    [
        (np.zeros((0, 5, 3), np.uint8), 'sides of 1'),
        (np.zeros((1, MAX_SIDE + 1), np.uint8), 'sides of 1'),
        (np.zeros((4, 4, 2), np.uint8), 'channels last'),
        (np.zeros((3, 40, 40), np.uint8), 'channels last'),
        (np.zeros((4,), np.uint8), 'channels last'),
        (np.zeros((4, 4), np.uint16), 'uint16'),
        (np.zeros((4, 4), bool), 'bool'),
        (np.full((4, 4, 3), np.nan, np.float32), 'NaN'),
        (np.full((4, 4, 3), np.inf, np.float32), 'inf'),
        (np.full((4, 4, 3), 255.0), 'divide'),
        (np.full((4, 4, 3), -0.1), 'clip'),
        (np.zeros((1, 4000), np.uint8), 'too narrow'),
        (np.zeros((9000, 9), np.uint8), 'too narrow'),
        ([[0, 1]], 'list'),
    ],
)
def test_unusable_images_are_refused_with_the_reason(image, reason):
    with pytest.raises(InputError, match=reason):
        prepare(image, ImageConfig(), SMALL)


def test_unusable_sizes_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match='use 96 or 104'):
        prepare(noise(50, 60), ImageConfig(long_side=100), SMALL)
    with pytest.raises(InputError, match="use fit 'crop' or 'pad'"):
        prepare(noise(50, 50), ImageConfig(fit='eval'), SMALL)


CASES = [
    ((480, 640), ImageConfig()),
    ((640, 480), ImageConfig()),  # cropped
    ((300, 640), ImageConfig(fit='pad')),
    ((640, 350), ImageConfig(fit='pad')),
    ((436, 1024), ImageConfig(fit='eval')),
    ((120, 160), ImageConfig(long_side=224)),  # enlarged
]


@pytest.mark.parametrize('camera_hw, config', CASES)
def test_a_point_appears_where_the_moved_intrinsics_project_it(camera_hw, config):
    """Draw a blob at a point's projection; its centre must move as network_K says.

    Tolerance 0.05 network pixels: resampling is exact at the edges, what remains is 8-bit rounding
    and the tails of the blob. A convention off by half a pixel would be off by 0.1 to 0.5.
    """
    height, width = camera_hw
    K_camera = torch.tensor(
        [[400.0, 0, width / 2 - 7], [0, 410, height / 2 + 5], [0, 0, 1]]
    ).double()
    point_camera = torch.tensor([0.11, -0.07, 1.9], dtype=torch.float64)

    def project(K):
        pixel = K @ point_camera
        return (pixel[:2] / pixel[2]).numpy()

    u, v = project(K_camera)
    rows, columns = np.mgrid[:height, :width]
    sigma = 0.03 * max(camera_hw)
    blob = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2))
    tensor, geometry = prepare(1 - np.repeat(blob[..., None], 3, 2), config, PUBLISHED)
    mass = 1 - tensor[0].double().numpy()  # the padding is white, hence without mass
    rows, columns = np.mgrid[: mass.shape[0], : mass.shape[1]]
    centre = np.array([(columns * mass).sum(), (rows * mass).sum()]) / mass.sum()
    assert np.abs(centre - project(geometry.network_K(K_camera))).max() < 0.05


@pytest.mark.parametrize('camera_hw, config', CASES)
def test_intrinsics_come_back_from_the_network(camera_hw, config):
    _, geometry = prepare(noise(*camera_hw), config, SMALL)
    K = torch.tensor([[400.0, 0, 311], [0, 410, 233], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(geometry.camera_K(geometry.network_K(K)), K)
    assert geometry.network_K(K.float().expand(2, 5, 3, 3)).shape == (2, 5, 3, 3)


@pytest.mark.parametrize('camera_hw, config', CASES)
def test_maps_at_camera_resolution_keep_their_rays(camera_hw, config):
    _, geometry = prepare(noise(*camera_hw), config, SMALL)
    height, width = geometry.network_size_hw
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    camera_map = geometry.to_camera(torch.stack([u, v], -1).float())  # [H, W, 2] network pixels
    assert camera_map.shape == (*camera_hw, 2)
    K_network = torch.tensor([[90.0, 0, width / 2], [0, 90, height / 2], [0, 0, 1]]).double()
    K_camera = geometry.camera_K(K_network)
    rows, columns = torch.nonzero(~camera_map[..., 0].isnan(), as_tuple=True)
    rays = torch.stack([columns, rows, torch.ones_like(rows)], -1).double() @ K_camera.inverse().T
    exact = (rays @ K_network.T)[:, :2]
    assert (camera_map[rows, columns] - exact).abs().max() <= 0.5 + 1e-5  # the pixel it lies in


def test_what_the_crop_removed_is_nan_and_the_rest_is_complete():
    _, geometry = prepare(noise(640, 480), ImageConfig(), SMALL)  # 112 x 152 rows, 112 kept
    camera_map = geometry.to_camera(torch.ones(112, 112))
    inside = ~camera_map.isnan()
    assert inside.any(1).sum() == pytest.approx(640 * 112 / 152, abs=1)
    assert inside[inside.any(1)].all() and not inside[0].any() and not inside[-1].any()
    rgb = geometry.to_camera(torch.full((112, 112, 3), 7, dtype=torch.uint8), fill=0)
    assert rgb.dtype == torch.uint8 and set(rgb.unique().tolist()) == {0, 7}


def test_the_identity_geometry_changes_nothing():
    geometry = ImageGeometry((40, 60), (8, 8), (0.2, 0.2), (-2, 0)).identity()
    values = torch.rand(40, 60)
    assert torch.equal(geometry.to_camera(values), values)
    assert torch.equal(geometry.network_K(torch.eye(3)), torch.eye(3))


def test_a_map_of_another_size_is_refused():
    with pytest.raises(InputError, match='expected a map'):
        ImageGeometry((40, 60), (8, 8), (0.2, 0.2), (0, 0)).to_camera(torch.ones(9, 8))


def test_a_folder_of_photos_is_read_upright_and_in_numerical_order(tmp_path):
    for number in (10, 2, 1):
        Image.new('RGB', (6, 4), (number, 0, 0)).save(tmp_path / f'{number}.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # camera held upright: rotate by 90 degrees to show
    Image.new('RGB', (6, 4)).save(tmp_path / '11.jpg', exif=exif)
    Image.new('RGBA', (6, 4)).save(tmp_path / '12.png')
    (tmp_path / 'notes.txt').write_text('not an image')
    photos = load_photos(tmp_path)
    assert [photo[0, 0, 0] for photo in photos[:3]] == [1, 2, 10]
    assert [photo.shape for photo in photos[3:]] == [(6, 4, 3), (4, 6, 4)]
    assert np.array_equal(load_photos([tmp_path / '10.png'])[0], photos[2])


def test_unreadable_photos_are_named(tmp_path):
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'\xff\xd8 no jpeg')
    cut = tmp_path / 'cut.png'
    Image.fromarray(noise(50, 50)).save(cut)
    cut.write_bytes(cut.read_bytes()[:400])
    deep = tmp_path / 'deep.png'
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep)
    for path in (broken, cut, deep, tmp_path / 'absent.jpg'):
        with pytest.raises(DataError, match=path.name):
            load_photo(path)


def test_a_folder_without_photos_is_an_error(tmp_path):
    with pytest.raises(DataError, match='holds no image'):
        load_photos(tmp_path)
    with pytest.raises(DataError, match='not a folder'):
        list_photos(tmp_path / 'absent')


@pytest.mark.parametrize('fit', ['crop', 'pad', 'eval'])
@pytest.mark.parametrize('size', [(60, 100), (100, 60), (50, 200)])
def test_camera_area_is_what_is_not_padding(fit, size):
    black = np.zeros((*size, 3), np.uint8)
    image, geometry = prepare(black, ImageConfig(fit=fit), ModelConfig(img_size=70, patch_size=14))
    area = torch.zeros(image.shape[1:], dtype=torch.bool)
    area[geometry.camera_area()] = True
    assert torch.equal(area, (image == 0).all(0))
