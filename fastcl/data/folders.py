"""Image trees and zips of them: classes are folders, images stay encoded until they are asked for."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastcl.data.readers import Encoded, Read, Source, decode, naming
from fastcl.errors import FastclError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "validation"),
}
_HEADER_BYTES = 1 << 16
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"


class Tree:
    """Image files under a folder. Holds paths only, so threads, forked workers and pickles share nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(name for name in _walk(root) if _is_image(name))

    def label(self, i: int) -> str:
        """What an error message calls image i."""
        return str(self.root / self.names[i])

    def open(self, i: int, limit: int = -1) -> BinaryIO:
        """Image i's bytes; a file needs no limit: a decoder reads only what it wants."""
        return open(self.root / self.names[i], "rb")


class Zip:
    """Image files in a zip. Every read opens the archive anew at the entry's offset, so that no file position is
    shared between threads or forked workers, and the directory is parsed once however many of them read."""

    def __init__(self, path: Path) -> None:
        with naming(f"cannot read {path} as a zip"), zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist() if _is_image(info.filename)}
        self.path = path
        self.names = sorted(entries)
        for name, info in entries.items():
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise FastclError(
                    f"{path}!{name}: only plain stored or deflated entries are read, "
                    f"got method {info.compress_type}, {'encrypted' if info.flag_bits & 1 else 'not encrypted'}"
                )
        infos = [entries[name] for name in self.names]
        self._offset = np.array([info.header_offset for info in infos], np.int64)
        self._size = np.array([info.compress_size for info in infos], np.int64)
        self._crc = np.array([info.CRC for info in infos], np.int64)
        self._deflated = np.array([info.compress_type == zipfile.ZIP_DEFLATED for info in infos], bool)

    def label(self, i: int) -> str:
        """What an error message calls image i."""
        return f"{self.path}!{self.names[i]}"

    def open(self, i: int, limit: int = -1) -> BinaryIO:
        """Image i's bytes, or their beginning from the first `limit` packed bytes (whose checksum cannot be known)."""
        size = int(self._size[i])
        wanted = size if limit < 0 else min(limit, size)
        with open(self.path, "rb") as file:
            file.seek(int(self._offset[i]))
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise FastclError(f"no zip entry at byte {self._offset[i]}")
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
            data = file.read(wanted)
        if self._deflated[i]:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data)
        if wanted == size and zlib.crc32(data) != self._crc[i]:
            raise FastclError(f"checksum {zlib.crc32(data):08x} over {len(data)} bytes, expected {self._crc[i]:08x}")
        return io.BytesIO(data)


def read_folder(path: Path) -> Source:
    """An image tree, or a zip of one. RGB; a class is the image's folder, by its whole path below the root.

    Where all top-level folders are split names (train or training; test or testing; val, valid, validation, dev, eval
    or evaluation, in any case), they are the official splits, possibly below one wrapping folder: the test images are
    `test` where there is one, else the validation images; with both, the validation images are left out.
    Sample ids count all images, those of a left-out split too, in the order of their sorted paths. Hidden files and
    folders and macOS's resource forks are passed over, and so is everything that has no image extension.
    """
    if not path.exists():
        raise FastclError(f"no such folder or zip: {path}")
    store = Tree(path) if path.is_dir() else Zip(path)
    if not store.names:
        raise FastclError(f"{path} holds no image files ({' '.join(EXTENSIONS)})")
    folders = [name.split("/")[:-1] for name in store.names]
    depth, split = _official_splits(folders)
    bare = [i for i, folder in enumerate(folders) if len(folder) <= depth]
    if bare:
        raise FastclError(f"{store.label(bare[0])} lies in no class folder ({len(bare)} such images)")
    classes = ["/".join(folder[depth:]) for folder in folders]
    used = [kind != "left out" for kind in split]
    names = sorted({name for name, use in zip(classes, used, strict=True) if use})
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[name] if use else -1 for name, use in zip(classes, used, strict=True)], np.int64)
    test = np.array([kind == "test" for kind in split]) if depth else None
    title = path.resolve().name if path.is_dir() else path.stem
    return Source(title, tuple(names), 3, labels, test, partial(_open_files, store))


def _official_splits(folders: Sequence[Sequence[str]]) -> tuple[int, list[str]]:
    """How many leading folders are not part of the class (0: no official split), and each image's split."""
    wrapped = len({folder[0] for folder in folders if folder}) == 1 and all(len(folder) > 1 for folder in folders)
    for depth in (1, 2) if wrapped else (1,):
        kinds = [_SPLITS.get(folder[depth - 1].lower(), "") if len(folder) >= depth else "" for folder in folders]
        found = set(kinds)
        if "" not in found and "train" in found and len(found) > 1:
            test = "test" if "test" in found else "validation"
            return depth, [{"train": "train", test: "test"}.get(kind, "left out") for kind in kinds]
    return 0, ["train"] * len(folders)


def _walk(root: Path) -> list[str]:
    """All files below a folder, as paths relative to it with forward slashes. Links are followed, but not upwards."""

    def fail(error: OSError) -> None:
        raise FastclError(f"cannot list {error.filename}: {error.strerror}") from error

    names = []
    for parent, directories, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        targets = {name: os.path.realpath(os.path.join(parent, name)) for name in directories}
        directories[:] = [
            name
            for name in directories
            if not name.startswith(".") and os.path.commonpath([real, targets[name]]) != targets[name]
        ]
        base = Path(parent).relative_to(root)
        names += [(base / name).as_posix() for name in files]
    return names


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))  # macOS's resource forks too: ._name
    return name.lower().endswith(EXTENSIONS) and not hidden


def _open_files(store: Tree | Zip, ids: np.ndarray) -> tuple[np.ndarray, Read, Encoded]:
    headers = [_header_or_none(store, i) for i in ids.tolist()]
    sizes = np.array([size for size, _ in headers], np.int64)
    jpeg = np.array([is_jpeg for _, is_jpeg in headers])
    return sizes, partial(_file_pixels, store, ids), partial(_jpeg_bytes, store, ids, jpeg)


def _header_or_none(store: Tree | Zip, i: int) -> tuple[tuple[int, int], bool]:
    """(0, 0) for a file whose header cannot be read: reading the image will say why."""
    try:
        return _header(store, i)
    except FastclError:
        return (0, 0), False


def _header(store: Tree | Zip, i: int) -> tuple[tuple[int, int], bool]:
    """(height, width), and whether it is a grey or RGB JPEG. The first bytes hold the header in all but a few files."""
    limit = _HEADER_BYTES if store.names[i].lower().endswith((".jpg", ".jpeg", ".png")) else -1
    with naming(store.label(i)):
        try:
            with store.open(i, limit) as file, Image.open(file) as picture:
                return (picture.height, picture.width), _is_jpeg(picture)
        except Exception:  # decoders fail in many ways on a beginning that does not hold the whole header
            with store.open(i) as file, Image.open(file) as picture:
                return (picture.height, picture.width), _is_jpeg(picture)


def _is_jpeg(picture: Image.Image) -> bool:
    return picture.format == "JPEG" and picture.mode in ("L", "RGB")


def _file_pixels(store: Tree | Zip, ids: np.ndarray, i: int) -> np.ndarray:
    with naming(store.label(int(ids[i]))), store.open(int(ids[i])) as file, Image.open(file) as picture:
        return decode(picture, 3)


def _jpeg_bytes(store: Tree | Zip, ids: np.ndarray, jpeg: np.ndarray, i: int) -> bytes | None:
    if not jpeg[i]:
        return None
    with naming(store.label(int(ids[i]))), store.open(int(ids[i])) as file:
        data = file.read()
    return data if _has_end(data) else None


def _has_end(data: bytes) -> bool:
    """Whether a JPEG file's last scan is followed by its end marker, as it is unless the file was cut short. Decoders
    that skip the rest of a file would not notice; what reads it whole does, and names it."""
    return data.endswith(_JPEG_END) or data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)
