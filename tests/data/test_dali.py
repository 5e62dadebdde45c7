"""DALI against torchvision, stage by stage on identical inputs."""

import pickle
from functools import lru_cache

import numpy as np
import pytest
import torch
from dali_views import PLAIN, REAL, against_torchvision, array_split, drawn, jpeg, photo, real_split, take
from PIL import Image
from small_images import noise, png, write_tree, write_zip
from torchvision.transforms.v2 import functional as F

from fastcl import FastclError
from fastcl.data import ViewSpec, center_view, load
from fastcl.data.renderers.dali import DaliRenderer

pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install '.[dali]')")

STAGE_MAX = 3.0  # grey levels
CHAIN_MEAN = 1.5


@pytest.fixture(scope="module")
def real(data_path):
    """Function from the name of a real data file to its training split."""
    find = lru_cache(real_split)
    return lambda name: find(data_path(name))


@pytest.mark.parametrize("name", REAL)
def test_decoding_alone(real, name):
    split, side = real(name), 32
    spec = ViewSpec(size=side, **PLAIN)
    positions = take(split, 40)
    (params,) = drawn(split, positions, spec, views=1)
    # Crops that no resize changes: any difference is the decoder's.
    box = params.box.copy()
    box[:, 2:] = side
    box[:, :2] = np.minimum(box[:, :2], split.sizes[positions] - side)
    params.box[:] = box
    (got,) = DaliRenderer(split, spec, "cpu")(positions, [params])
    for k, position in enumerate(positions):
        top, left = box[k, :2].astype(int)
        crop = split.image(int(position))[top : top + side, left : left + side]
        worst = (got[k] * 255 - torch.from_numpy(crop.copy()).permute(2, 0, 1)).abs().max().item()
        assert worst <= STAGE_MAX, (position, worst)


@pytest.mark.parametrize("size", [7, 64, 200])
@pytest.mark.parametrize("source", ["photographs", "noise"])
def test_crop_and_resize_alone(real, source, size):
    # Noise has an edge at every pixel: the border of a reduced image is where resamplers differ by many levels.
    if source == "photographs":
        split = real("clothing10.zip")
        images = [split.image(int(p)) for p in take(split, 16)]
    else:
        images = [noise(i, 90 + i, 40 + 9 * i) for i in range(16)]
    pixels, spec = array_split(images), ViewSpec(size=size, **PLAIN)
    positions = np.arange(16)
    greatest, mean = against_torchvision(pixels, positions, drawn(pixels, positions, spec), spec)
    assert greatest <= STAGE_MAX and mean <= 0.5, (greatest, mean)


def test_smallest_crops():
    images = [noise(i, 5, 9) for i in range(4)]
    split, spec = array_split(images), ViewSpec(size=6, **PLAIN)
    params = center_view(spec, split.sizes)
    params.box[:] = [[0, 0, 1, 1], [4, 8, 1, 1], [2, 0, 1, 9], [0, 3, 5, 1]]
    assert against_torchvision(split, np.arange(4), [params], spec)[0] <= 1


def test_flip_alone():
    images = [noise(i, 20 + i, 31) for i in range(8)]
    split, positions = array_split(images), np.arange(8)
    plain = ViewSpec(size=16, **PLAIN)
    flipped = ViewSpec(size=16, **{**PLAIN, "flip": 1.0})
    (straight,) = DaliRenderer(split, plain, "cpu")(positions, drawn(split, positions, plain, 1))
    (mirrored,) = DaliRenderer(split, flipped, "cpu")(positions, drawn(split, positions, flipped, 1))
    assert torch.equal(mirrored, straight.flip(3))


def test_rotation_alone(real):
    spec = ViewSpec(size=100, rotation=45.0, **PLAIN)
    source = real("fruits65.zip")
    split = array_split([source.image(int(p)) for p in take(source, 12)] + [noise(i, 100, 100) for i in range(4)])
    params = center_view(spec, split.sizes)
    params.angle[:] = np.r_[np.linspace(-45, 45, 14), 0, 0]
    (got,) = DaliRenderer(split, spec, "cpu")(np.arange(16), [params])
    for k in range(16):
        x = torch.from_numpy(split.image(k)).permute(2, 0, 1)
        if k < 14:
            x = F.rotate(x, float(params.angle[k]), interpolation=F.InterpolationMode.BILINEAR)
        worst = (got[k] * 255 - x).abs().max().item()
        assert worst <= (STAGE_MAX if k < 14 else 1e-4), (k, worst)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("preset", [("simclr", {"size": 64, "rotation": 10.0}), ("cifar", {})])
def test_whole_chain(real, name, preset):
    split, spec = real(name), ViewSpec.preset(preset[0], **preset[1])
    positions = take(split, 48)
    greatest, mean = against_torchvision(split, positions, drawn(split, positions, spec), spec)
    print(f"{name} {preset[0]}: greatest difference {greatest:.1f} grey levels (jitter amplifies), mean {mean:.3f}")
    assert mean <= CHAIN_MEAN


def test_grey_images():
    split, spec = load("digits").train, ViewSpec.preset("characters")
    positions = take(split, 30)
    assert split.encoded is None
    greatest, _ = against_torchvision(split, positions, drawn(split, positions, spec), spec)
    assert greatest <= STAGE_MAX


@pytest.fixture
def mixed():
    transparent = np.concatenate([noise(1, 50, 30), noise(2, 50, 30, 1)], 2)
    turned = Image.Exif()
    turned[0x112] = 6
    return {
        "a/colour.jpg": jpeg(photo(0)),
        "a/grey.jpg": jpeg(photo(1, 33, 47), "L"),
        "a/inks.jpg": jpeg(photo(2, 41, 37), "CMYK"),
        "a/lossless.png": png(noise(3, 29, 53)),
        "a/transparent.png": png(transparent),
        "b/named.png": jpeg(photo(4, 63, 31)),
        "b/progressive.jpg": jpeg(photo(5, 40, 40), progressive=True, subsampling=2),
        "b/turned.jpg": jpeg(photo(6, 30, 64), exif=turned),
        "b/full.jpg": jpeg(photo(7, 45, 39), subsampling=0),
    }


@pytest.mark.parametrize("zipped", [False, True])
def test_mixed_formats_and_sizes(tmp_path, mixed, zipped):
    source = write_zip(tmp_path / "x.zip", mixed) if zipped else write_tree(tmp_path, mixed)
    split = load(source, test_fraction=0.01).train
    names = np.array(sorted(mixed))[split.ids]
    own = {"a/inks.jpg", "a/lossless.png", "a/transparent.png"}  # read by Pillow, as without DALI
    again = pickle.loads(pickle.dumps(split))
    for i, name in enumerate(names):
        assert split.encoded(i) == again.encoded(i) == (None if name in own else mixed[name]), name
    assert set(names) & own and set(names) - own
    spec, positions = ViewSpec(size=24, **PLAIN), np.arange(len(split))
    greatest, _ = against_torchvision(split, positions, drawn(split, positions, spec), spec)
    assert greatest <= STAGE_MAX


def test_a_file_that_is_removed_is_named_with_the_way_out(tmp_path):
    split = load(write_tree(tmp_path, {f"{c}/{i}.jpg": jpeg(photo(i)) for c in "ab" for i in range(2)})).train
    spec, positions = ViewSpec(size=8, **PLAIN), np.arange(2)
    renderer = DaliRenderer(split, spec, "cpu")
    for file in tmp_path.glob("*/*.jpg"):
        file.unlink()
    with pytest.raises(FastclError, match=r"/[ab]/\d.jpg: FileNotFoundError: .*corrupt=skip leaves out"):
        renderer(positions, drawn(split, positions, spec))


def test_images_that_are_views_of_other_arrays():
    images = [noise(i, 12, 14)[::-1, 1:13] for i in range(3)]
    split, spec = array_split(images), ViewSpec(size=12, **PLAIN)
    (got,) = DaliRenderer(split, spec, "cpu")(np.arange(3), [center_view(spec, split.sizes)])
    assert torch.equal((got * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(np.stack(images)))
