"""The fused renderer: torchvision's pixels within the stated bounds, and bits that depend on nothing but the view."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torchvision.transforms.v2 import functional as F
from triton_runs import poisoned

from fastcl import FastclError
from fastcl.data import Split, ViewParams, ViewPlan, ViewSpec, center_view, load, render_torchvision
from fastcl.data.philox import philox4x32
from fastcl.data.renderers import triton_launch as launching
from fastcl.data.renderers.colour import colour_stage
from fastcl.data.renderers.triton import TritonRenderer, obstacle
from fastcl.kernels.augment.parameters import COLUMNS
from fastcl.kernels.common.launch import recording

# Stated bounds, in grey levels, on identical inputs.
GEOMETRY, COLOUR, CHAIN_MEAN = 3, 1, 1.5
EXACT = 0.01  # levels: float32 arithmetic in another order
PLAIN = dict(mean=(0.0,), std=(1.0,))
STILL = dict(flip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), **PLAIN)  # crops that are the whole square image


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """A pixel that no kernel writes is NaN, or wrong by much."""

    def empty(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            return torch.full(args, 249, **kwargs)
        return poisoned(*args, **kwargs)

    fake = SimpleNamespace(**{name: getattr(torch, name) for name in ("float32", "uint8", "int64")}, empty=empty)
    monkeypatch.setattr(launching, "torch", fake)


@pytest.fixture
def route(request, monkeypatch):
    """The launches of small views ("whole"), or those of large ones on views of few tiles ("tiles")."""
    if request.param == "tiles":
        monkeypatch.setattr(launching, "WHOLE", 0)
        monkeypatch.setattr(launching, "WHOLE_TURNED", 0)
        monkeypatch.setattr(launching, "_TILE", 8)


both_routes = pytest.mark.parametrize("route", ["whole", "tiles"], indirect=True)


def smooth(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Images with edges, gradients, noise, black and white; (n, height, width, channels) uint8."""
    random = np.random.default_rng(n + height)
    noise = random.normal(0, 40, (n, height, width, channels)).cumsum(2) + random.normal(0, 20, (n, 1, 1, channels))
    return (128 + noise).clip(0, 255).astype(np.uint8)


def split_of(images: np.ndarray) -> Split:
    n = len(images)
    return Split(np.arange(n), np.zeros(n, np.int64), np.tile(images.shape[1:3], (n, 1)), lambda i: images[i].copy())


def draw(images: np.ndarray, spec: ViewSpec, view: int = 0) -> ViewParams:
    split = split_of(images)
    return ViewPlan(spec, 5).draw(1, split.ids, view, split.sizes)


def rendered(images: np.ndarray, p: ViewParams, spec: ViewSpec, device: torch.device) -> torch.Tensor:
    (view,) = TritonRenderer(split_of(images), spec, device)(np.arange(len(images)), [p])
    assert view.device.type == device.type and view.dtype == torch.float32
    return view.cpu()


def rounds_between_passes() -> bool:
    """Whether PyTorch resizes uint8 as such here; on some processors some versions do in float32 (2.6, AVX-512)."""
    x = torch.arange(3 * 90 * 70, dtype=torch.int32).mul(37).remainder(251).to(torch.uint8).reshape(3, 90, 70)
    return not torch.equal(F.resize(x, [40, 40]), F.resize(x.float(), [40, 40]).round().to(torch.uint8))


def errors(images: np.ndarray, p: ViewParams, spec: ViewSpec, device: torch.device) -> torch.Tensor:
    """Distances from the reference in grey levels; spec does not normalise."""
    return (rendered(images, p, spec, device) - render_torchvision(list(images), p, spec)).abs() * 255


@pytest.mark.parametrize(
    ("route", "shape", "size", "turn"),
    [
        ("whole", (3, 40, 57, 3), 9, 0), ("whole", (4, 20, 17, 3), 24, 0), ("whole", (4, 33, 21, 1), 16, 0),
        ("whole", (1, 130, 90, 3), 8, 0), ("whole", (2, 9, 9, 3), 2, 0), ("tiles", (2, 20, 17, 3), 10, 0),
        ("whole", (2, 23, 25, 3), 12, 15), ("whole", (1, 14, 30, 1), 16, 180), ("tiles", (1, 13, 15, 1), 10, 15),
    ],
    indirect=["route"],
)  # fmt: skip
def test_crop_resize_flip_and_rotation(shape, size, turn, route, device):
    spec = ViewSpec(size=size, rotation=turn, jitter=0.0, grayscale=0.0, **PLAIN)
    images = smooth(*shape)
    p = draw(images, spec)
    p = replace(p, flip=np.arange(len(images)) % 2 == 0)
    error = errors(images, p, spec, device)
    # The kernels round between the passes over rows and columns; where the reference does not, more pixels differ.
    assert error.max() <= GEOMETRY and error.mean() <= (0.1 if rounds_between_passes() else 0.25)
    levels = rendered(images, p, spec, device) * 255
    assert (levels - levels.round()).abs().max() < 1e-4, "rounded to uint8 before colours, as the reference is"


def test_quarter_turns_and_none_are_exact(device):
    images = smooth(5, 10, 10, 1)
    spec = ViewSpec(size=10, rotation=180.0, jitter=0.0, grayscale=0.0, **STILL)
    p = replace(draw(images, spec), angle=np.array([0.0, 90, -90, 180, -180]))
    assert errors(images, p, spec, device).max() < EXACT


@pytest.mark.parametrize(
    ("route", "channels", "views"), [("whole", 3, 24), ("whole", 1, 8), ("tiles", 3, 8)], indirect=["route"]
)
def test_jitter_in_every_order(channels, views, route, device):
    strong = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    spec = ViewSpec(size=10, jitter=1.0, grayscale=0.2, **strong, **STILL)
    many = ViewPlan(spec, 0).draw(0, np.arange(2000), 0, np.full((2000, 2), 10))
    _, first = np.unique(many.order, axis=0, return_index=True)
    assert len(first) == 24
    p = many[first[:: 24 // views]]  # contrast at every place in any of them
    assert {*np.nonzero(p.order == 1)[1]} == {0, 1, 2, 3} and p.grayscale.any()
    images = smooth(views, 10, 10, channels)
    images[0], images[1], images[2, ::2] = 0, 255, 7
    images[3, ..., 0], images[3, ..., 1:] = 255, 0  # red: a hue at the seam
    assert errors(images, p, spec, device).max() < EXACT < COLOUR


def test_solarisation(device):
    spec = ViewSpec(size=16, solarize=1.0, grayscale=0.0, jitter=0.0, **STILL)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert errors(every, draw(every, spec), spec, device).max() < EXACT
    images = smooth(6, 16, 16)
    spec = replace(spec, solarize=0.7, jitter=1.0)
    # A value that rounds to another side of the threshold jumps by a level.
    error = errors(images, draw(images, spec), spec, device)
    assert error.max() <= COLOUR + EXACT and error.mean() < EXACT


@pytest.mark.parametrize(
    ("route", "kernel", "size", "channels"),
    [("whole", 3, 12, 1), ("whole", 5, 10, 3), ("whole", 7, 4, 3), ("tiles", 5, 10, 1)],
    indirect=["route"],
)
def test_blur(kernel, size, channels, route, device):
    spec = ViewSpec(size=size, blur=0.7, blur_kernel=kernel, blur_sigma=(0.1, 3.0), solarize=0.2, jitter=0.0, **STILL)
    images = smooth(6, size, size, channels)
    p = draw(images, spec)
    assert 0 < (p.blur_sigma > 0).sum() < len(images)
    error = errors(images, p, spec, device)
    assert error.max() <= COLOUR + EXACT and error.mean() < EXACT
    assert error[~p.solarize].max() < EXACT


@pytest.mark.parametrize(("preset", "size"), [("cifar", 32), ("simclr", 20)])
def test_whole_chain_on_photographs(preset, size, data_path, device):
    train = load(f"cifar10:{data_path('cifar10_jpeg75.npz')}", classes=2).train
    images = np.stack([train.image(i) for i in range(4)])
    spec = ViewSpec.preset(preset, size=size, blur_kernel=3, **PLAIN)
    p = draw(images, spec)
    error = errors(images, p, spec, device)
    print(f"{preset}: mean {error.mean():.4f}, maximum {error.max():.2f} grey levels")
    assert error.mean() <= CHAIN_MEAN
    still = ViewSpec(size=size, jitter=0.0, grayscale=0.0, **PLAIN)
    neutral = replace(p, jitter=np.zeros(4, bool), grayscale=np.zeros(4, bool), blur_sigma=np.zeros(4))
    geometry = rendered(images, neutral, still, device)
    assert (geometry - render_torchvision(list(images), neutral, still)).abs().max() * 255 <= GEOMETRY
    # Colours of the same pixels: what remains is arithmetic.
    reference = colour_stage((geometry * 255).round().byte(), p, spec)
    assert (rendered(images, p, spec, device) - reference).abs().max() * 255 < EXACT


def test_views_larger_than_a_program(device):
    assert launching.WHOLE < 66
    images = smooth(1, 70, 66, 1)
    spec = ViewSpec(size=66, blur=1.0, jitter=1.0, scale=(0.5, 1.0), grayscale=0.0, **PLAIN)
    error = errors(images, draw(images, spec), spec, device)
    assert error.mean() <= CHAIN_MEAN


def test_neutral_parameters_change_nothing_and_normalisation(device):
    images = smooth(3, 12, 12)
    spec = ViewSpec.preset("cifar", size=12)
    p = center_view(spec, split_of(images).sizes)
    expected = colour_stage(torch.from_numpy(images).permute(0, 3, 1, 2), p, spec)
    assert torch.allclose(rendered(images, p, spec, device), expected, atol=1e-6)
    one = replace(spec, **PLAIN)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(rendered(images, p, one, device), expected)


@both_routes
def test_a_view_depends_on_its_image_and_parameters_alone(route, device):
    images = smooth(4, 11, 13)
    spec = ViewSpec(size=9, jitter=1.0, blur=0.5, solarize=0.5, rotation=20.0 * (launching.WHOLE > 0), **PLAIN)
    renderer = TritonRenderer(split_of(images), spec, device, threads=2)
    one, two = draw(images, spec), draw(images, spec, 1)
    assert 0 < (two.blur_sigma > 0).sum() < 4 and two.solarize.any()
    whole = renderer(np.arange(4), [one, two])
    assert not torch.equal(*whole) and all(view.isfinite().all() for view in whole)
    order = np.array([3, 1, 1])
    picked = renderer(order, [two[order]])[0]
    assert torch.equal(picked, whole[1][order])
    parts = [renderer(np.array([k]), [two[k : k + 1]])[0] for k in (0, 2)]
    assert torch.equal(torch.cat(parts), whole[1][::2])


@pytest.mark.parametrize(
    ("size", "turns", "blurred", "expected"),
    [
        (32, False, 0, ["view_kernel"]),
        (64, False, 0, ["view_kernel"]),
        (64, True, 0, ["levels_kernel", "colour_kernel"]),
        (65, False, 0, ["levels_kernel", "colour_kernel"]),
        (224, False, 3, ["levels_kernel", "colour_kernel", "blur_kernel", "blur_kernel"]),
    ],
)
def test_launches(size, turns, blurred, expected, monkeypatch):
    monkeypatch.setattr(launching, "torch", torch)
    images, table = torch.empty(2, 9, 9, 3, dtype=torch.uint8), torch.empty(8, COLUMNS.value, dtype=torch.int32)
    with recording() as launches:
        launching.render(images, table, torch.empty(2, 3), torch.empty(blurred, dtype=torch.int32), size, turns, 3)
    assert [launch.kernel.fn.__name__ for launch in launches] == expected


@triton.jit
def _philox_kernel(counters, words, seed):
    o = tl.arange(0, 4)
    c0, c1, c2, c3 = (tl.load(counters + o * 4), tl.load(counters + o * 4 + 1), tl.load(counters + o * 4 + 2),
                      tl.load(counters + o * 4 + 3))  # fmt: skip
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words + o * 4, w0.to(tl.int32, bitcast=True))
    tl.store(words + o * 4 + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words + o * 4 + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words + o * 4 + 3, w3.to(tl.int32, bitcast=True))


def test_tritons_philox_gives_the_plans_words(device):
    seed = 0x0123456789ABCDEF
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 4), dtype=np.uint32)
    counters[0], counters[1] = 0, 2**32 - 1
    words = torch.zeros(4, 4, dtype=torch.int32, device=device)
    _philox_kernel[(1,)](torch.from_numpy(counters.view(np.int32)).to(device), words, seed)
    expected = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
    assert np.array_equal(words.cpu().numpy().view(np.uint32), expected)


def test_obstacles(device, monkeypatch):
    spec, images = ViewSpec(size=8), smooth(3, 9, 9)
    split = split_of(images)
    assert obstacle(split, spec, device) is None
    assert "got 2" in obstacle(split_of(images[..., :2]), spec, device)
    assert "no images" in obstacle(split_of(images[:0]), spec, device)
    mixed = replace(split, sizes=np.array([[9, 9], [9, 9], [8, 9]]))
    assert "9x9 and 8x9" in obstacle(mixed, spec, device)
    with pytest.raises(FastclError, match="data.renderer 'triton': .*9x9 and 8x9"):
        TritonRenderer(mixed, spec, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=960))
    assert "need 729 bytes, more than 25% of the device's 960" in obstacle(split, spec, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in obstacle(split, spec, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA device, not cpu" in obstacle(split, spec, "cpu")


def test_means_that_do_not_fit_the_channels(device):
    with pytest.raises(FastclError, match=r"1 value or one per channel \(1\), got 3"):
        TritonRenderer(split_of(smooth(2, 9, 9, 1)), ViewSpec.preset("cifar", size=8), device)
