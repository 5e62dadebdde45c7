"""Small images, archives and trees of them whose every pixel is known, and what tests of data sources share."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fastcl.data.sources.load import Dataset


def noise(seed: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return f"folder:{root}"


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return f"folder:{path}"


def by_id(data: Dataset) -> dict[int, tuple[str, bool]]:
    """Sample id -> (class name, is a test image)."""
    return {
        int(i): (data.classes[c], split is data.test)
        for split in (data.train, data.test)
        for i, c in zip(split.ids, split.labels, strict=True)
    }


def pixels_by_id(data: Dataset) -> dict[int, np.ndarray]:
    return {int(i): split.image(k) for split in (data.train, data.test) for k, i in enumerate(split.ids)}


def check_shapes(data: Dataset) -> None:
    for split in (data.train, data.test):
        assert split.ids.dtype == split.labels.dtype == split.sizes.dtype == np.int64
        assert split.ids.shape == split.labels.shape == (len(split),)
        assert (np.diff(split.ids) > 0).all(), "source order"
        assert set(split.labels) == set(range(len(data.classes)))
        for k in range(len(split)):
            image = split.image(k)
            assert image.dtype == np.uint8
            assert image.shape == (*split.sizes[k], data.channels)
    assert not set(data.train.ids) & set(data.test.ids)
