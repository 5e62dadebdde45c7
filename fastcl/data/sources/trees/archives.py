"""Image files in a zip, unpacked only as far as they are read, and not beyond the size that the zip states."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from fastcl.data.limits import most_bytes
from fastcl.data.sources.opening import check_zip, naming
from fastcl.data.sources.trees.listing import HIDDEN, LeftOut, hidden, images
from fastcl.errors import FastclError, shown

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_AT_ONCE = 1 << 16  # packed bytes per read
_UNPACKED = 1 << 20  # maximum bytes from one call of the decompressor
_DOUBLE, _LINKED = "earlier versions of an entry", "links and special files"


class Zip:
    """Image files in a zip. Every read reopens the archive at the entry's offset, so that threads and forked workers
    share no file position. The zip's directory is parsed only once.

    Backslashes count as separators, since some Windows programs write them, and `.` parts of a path are ignored. Of
    several entries with the same name the last one is used, as by unzip programs. Everything else is counted in
    `left_out`.

    Args:
        path: the zip.
        max_pixels: limit per image; bounds the unpacked size of an entry.

    Raises:
        FastclError: not a zip, or an entry that is neither stored nor deflated, is encrypted, lies outside the
            archive's root, is too large for an image, or shares bytes with another entry.
    """

    def __init__(self, path: Path, max_pixels: int) -> None:
        self.path, self.left_out = path, LeftOut()
        with naming(f"cannot read {path} as a zip"), open(path, "rb") as file:
            check_zip(file)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        entries: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        for info in infos:
            name = _plain(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            directory = info.is_dir() or info.filename.endswith("\\")
            folder = name if directory else name.rpartition("/")[0]
            if not hidden(folder):
                folders.add(folder)
            if directory:
                continue
            if hidden(name):
                self.left_out.add(HIDDEN, name)
            elif kind not in (0, stat.S_IFREG):
                self.left_out.add(_LINKED, name)
            else:
                if name in entries:
                    self.left_out.add(_DOUBLE, name)
                entries[name] = info
        self.names = images(entries, self.left_out, str(path))
        self.left_out.add_lost(folders, self.names)
        chosen = [entries[name] for name in self.names]
        for name, info in zip(self.names, chosen, strict=True):
            _check(shown(f"{path}!{name}"), info, most_bytes(max_pixels))
        _check_apart(path, infos)
        self._offset = np.array([info.header_offset for info in chosen], np.int64)
        self._packed = np.array([info.compress_size for info in chosen], np.int64)
        self._size = np.array([info.file_size for info in chosen], np.int64)
        self._crc = np.array([info.CRC for info in chosen], np.int64)
        self._deflated = np.array([info.compress_type == zipfile.ZIP_DEFLATED for info in chosen], bool)

    def label(self, i: int) -> str:
        """Name of image i in error messages."""
        return shown(f"{self.path}!{self.names[i]}")

    def open(self, i: int) -> BinaryIO:
        """Image i as a file, unpacked only as far as it is read."""
        file = open(self.path, "rb")
        try:
            file.seek(int(self._offset[i]))
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise FastclError(f"no zip entry at byte {self._offset[i]}")
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        except BaseException:
            file.close()
            raise
        facts = int(self._packed[i]), int(self._size[i]), int(self._crc[i]), bool(self._deflated[i])
        return io.BufferedReader(_Entry(file, *facts))

    def whole(self, i: int) -> BinaryIO:
        """Image i as a file, fully unpacked and checked against its checksum."""
        return io.BytesIO(self.data(i))

    def data(self, i: int) -> bytes:
        """Image i's bytes."""
        with self.open(i) as file:
            return file.read()


class _Entry(io.RawIOBase):
    """An entry as a file. The checksum is verified once the whole entry has been read."""

    def __init__(self, file: BinaryIO, packed: int, size: int, crc: int, deflated: bool) -> None:
        self._file, self._left, self._size, self._crc = file, packed, size, crc
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if deflated else None
        self._data, self._position, self._waiting, self._done = bytearray(), 0, b"", False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence])
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        buffer = memoryview(buffer)
        self._fill(min(self._position + len(buffer), self._size))
        part = self._data[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        self._fill(self._size)
        data = bytes(self._data[self._position :] if self._position else self._data)
        self._position = max(self._position, self._size)
        return data

    def _fill(self, end: int) -> None:
        """Unpack up to a position; at the end, unpack everything that is left (which verifies the checksum)."""
        while not self._done and (len(self._data) < end or end >= self._size):
            self._more()
            if len(self._data) > self._size:
                raise FastclError(f"unpacks to more than the {self._size} bytes stated in the zip")

    def _more(self) -> None:
        packed = self._waiting or self._file.read(min(_AT_ONCE, self._left))
        self._left -= 0 if self._waiting else len(packed)
        if self._inflate is None:
            self._data += packed
        else:
            try:
                self._data += self._inflate.decompress(packed, _UNPACKED) if packed else self._inflate.flush()
            except zlib.error as error:
                raise FastclError(f"cannot be unpacked: {error}") from error
            self._waiting = self._inflate.unconsumed_tail
        self._done = not packed or (self._inflate is not None and self._inflate.eof)
        if self._done and ((crc := zlib.crc32(self._data)) != self._crc or len(self._data) != self._size):
            raise FastclError(
                f"checksum {crc:08x} over {len(self._data)} bytes, expected {self._crc:08x} over {self._size}"
            )


def _plain(name: str) -> str:
    """An entry's path with forward slashes. Raises FastclError if it leads outside the archive's root."""
    parts = [part for part in name.replace("\\", "/").split("/") if part != "."]
    if name[:1] in ("/", "\\") or ".." in parts or (len(parts) > 1 and parts[0][1:] == ":"):
        raise FastclError(f"zip entry {name!r} points outside the archive: create the archive again")
    return "/".join(part for part in parts if part)


def _check(label: str, info: zipfile.ZipInfo, most: int) -> None:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FastclError(
            f"{label}: only unencrypted stored or deflated entries are supported, "
            f"got method {info.compress_type}, {'encrypted' if info.flag_bits & 1 else 'not encrypted'}"
        )
    if info.file_size > most:
        raise FastclError(
            f"{label} unpacks to {info.file_size:,} bytes, more than an image of data.max_pixels needs ({most:,})"
        )


def _check_apart(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse entries that share packed bytes, the trick of zip bombs."""
    infos = sorted(infos, key=lambda info: info.header_offset)
    for a, b in zip(infos, infos[1:], strict=False):
        if a.header_offset + _LOCAL_HEADER.size + a.compress_size > b.header_offset:
            raise FastclError(f"{shown(path)}: the entries {a.filename!r} and {b.filename!r} overlap")
