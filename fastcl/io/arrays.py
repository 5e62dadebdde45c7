"""Arrays from .npy, .npz and .safetensors files: selected by name and checked by header before they are read."""

from __future__ import annotations

import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO, Literal, TypeAlias, cast

import torch
from torch import Tensor

from fastcl.errors import FastclError, shown
from fastcl.io.files import cause

if TYPE_CHECKING:
    import numpy as np

ENDINGS = (".npy", ".npz", ".safetensors")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_KINDS = {"O": "Python objects", "U": "text", "S": "bytes", "M": "dates", "m": "durations",
          "V": "raw bytes (as NumPy keeps bfloat16)"}  # fmt: skip
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I8": "int8", "I16": "int16",
                "I32": "int32", "I64": "int64", "U8": "uint8"}  # fmt: skip
_CHUNK = 1 << 24  # bytes read at a time
# Limits of decompression. Features hardly compress; zeros compress to a thousandth. Up to _SMALL decompressed bytes are
# always accepted.
_RATIO, _SMALL = 100, 1 << 28

Choose: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
Kind: TypeAlias = Literal["matrix", "layer", "integers"]
KindOf: TypeAlias = Callable[[str], Kind]


def file_status(path: Path) -> os.stat_result:
    """`Path.stat`. Raises FastclError if the path does not exist or cannot be accessed."""
    try:
        return path.stat()
    except FileNotFoundError:
        raise FastclError(f"{shown(path)} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise FastclError(f"{shown(path)} cannot be read ({cause(error)})") from error


def read_arrays(path: Path, choose: Choose, layers: bool = False, integers: Collection[str] = ()) -> dict[str, Tensor]:
    """Read selected arrays of a file; the others are neither decompressed nor converted.

    Args:
        path: a regular file with suffix .npy, .npz or .safetensors; its first bytes decide which format it is.
        choose: takes the names in the file (`features` for an .npy), in file order, and returns those to read.
        layers: also accept arrays of more than two dimensions, flattened to (samples, width).
        integers: names of arrays that must be (samples,) integers of at most 64 bits.

    Returns:
        By name, (samples, width) float16, bfloat16, float32 or float64, or (samples,) int64, in native byte order, on
        the CPU.

    Raises:
        FastclError: a file that is missing, damaged, of another kind, or larger than this machine's memory; a selected
            array that is not a float matrix (or integers), or is empty.
    """

    def kind_of(name: str) -> Kind:
        return "integers" if name in integers else "layer" if layers else "matrix"

    if not stat.S_ISREG(file_status(path).st_mode):
        raise FastclError(f"{shown(path)} is not a regular file")
    if path.suffix.lower() not in ENDINGS:
        raise FastclError(f"{shown(path)}: unsupported file type; save features as {', '.join(ENDINGS)}")
    try:
        with open(path, "rb") as file:
            read = _reader(file.read(9), path)
            file.seek(0)
            return read(path, file, choose, kind_of)
    except (FastclError, ModuleNotFoundError):
        raise
    except OSError as error:
        raise FastclError(f"{shown(path)} cannot be read ({cause(error)})") from error
    except MemoryError:
        raise FastclError(f"{shown(path)} cannot be read: it does not fit in memory") from None


def _reader(start: bytes, path: Path) -> Callable[[Path, BinaryIO, Choose, KindOf], dict[str, Tensor]]:
    """Choose the reader by content, not by suffix: an .npy renamed to .npz is still an .npy."""
    if start.startswith(b"\x93NUMPY"):
        return _read_npy
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_npz
    if start[8:] == b"{":
        return _read_safetensors
    what = "is neither a NumPy nor a safetensors file" if start else "is empty (0 bytes)"
    if start.startswith(b"\x80"):
        what = "is a pickle, which could run code; save the array with np.save"
    raise FastclError(f"{shown(path)} cannot be read: it {what}")


def _read_npy(path: Path, file: BinaryIO, choose: Choose, kind_of: KindOf) -> dict[str, Tensor]:
    size = os.fstat(file.fileno()).st_size
    return {name: _array(file, size, shown(path), kind_of(name)) for name in choose(["features"])}


def _read_npz(path: Path, file: BinaryIO, choose: Choose, kind_of: KindOf) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            found = _entries(archive, path)
            chosen = choose(list(found))
            unpacked, packed = sum(found[name].file_size for name in chosen), os.fstat(file.fileno()).st_size
            if unpacked > max(_SMALL, _RATIO * packed):
                raise FastclError(
                    f"{shown(path)}: {packed:,} bytes that unpack to {unpacked:,} look like a decompression bomb; "
                    "if they are features, save them uncompressed, with np.savez"
                )
            _check_memory(unpacked, shown(path))
            arrays = {}
            for name in chosen:
                with archive.open(found[name]) as entry:
                    where = f"{shown(path)}: {name!r}"
                    arrays[name] = _array(entry, found[name].file_size, where, kind_of(name))
            return arrays
    except (FastclError, OSError, MemoryError):
        raise
    except (NotImplementedError, RuntimeError) as error:  # raised by zipfile for compression methods and passwords
        raise FastclError(
            f"{shown(path)} cannot be read: it is encrypted or its compression is not supported; save it with np.savez"
        ) from error
    except Exception as error:  # each compression method raises its own exceptions
        raise FastclError(f"{shown(path)} cannot be read: the .npz is damaged") from error


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an .npz by name, without the files that macOS adds when it zips a folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        parts = PurePosixPath(info.filename).parts
        if not info.filename.endswith(".npy") or "__MACOSX" in parts or parts[-1].startswith("."):
            continue
        name = shown(info.filename.removesuffix(".npy"))
        if name in found:
            raise FastclError(f"{shown(path)} contains two arrays named {name!r}")
        found[name] = info
    if not found:
        raise FastclError(
            f"{shown(path)} contains no NumPy array (write .npz with np.savez, not torch.save; save tensors "
            "with safetensors.torch.save_file)"
        )
    return found


def _read_safetensors(path: Path, _file: BinaryIO, choose: Choose, kind_of: KindOf) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            names = {shown(name): name for name in opened.keys()}
            if not names:
                raise FastclError(f"{shown(path)} contains no array")
            arrays = {}
            for name in choose(list(names)):
                array, where = opened.get_slice(names[name]), f"{shown(path)}: {name!r}"
                dtype, shape = cast(str, array.get_dtype()), array.get_shape()
                _check(shape, _SAFETENSORS.get(dtype, dtype), where, kind_of(name))
                _check_memory(math.prod(shape) * getattr(torch, _SAFETENSORS[dtype]).itemsize, where)
                arrays[name] = _plain(opened.get_tensor(names[name]))
            return arrays
    except SafetensorError as error:
        raise FastclError(f"{shown(path)} cannot be read: the .safetensors is damaged") from error


def _plain(x: Tensor) -> Tensor:
    """Integers as int64, anything else as a matrix."""
    return x.flatten(1) if x.is_floating_point() else x.long()


def _array(file: IO[bytes], size: int, where: str, kind: Kind) -> Tensor:
    """Read an array in .npy format that takes `size` bytes including its header."""
    import numpy as np

    shape, fortran, dtype = _header(file, where)
    _check(shape, _described(dtype), where, kind)
    needed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needed != there:
        raise FastclError(
            f"{where} cannot be read: its header promises {needed:,} bytes for shape {_text(shape)}, but {there:,} "
            "follow" + ("; save several arrays as .npz" if there > needed else "")
        )
    _check_memory(needed, where)
    values = np.empty(math.prod(shape), dtype)
    raw = values.view(np.uint8)
    for begin in range(0, needed, _CHUNK):
        part = file.read(min(_CHUNK, needed - begin))
        if len(part) < min(_CHUNK, needed - begin):
            raise FastclError(f"{where} cannot be read: it is truncated")
        raw[begin : begin + len(part)] = np.frombuffer(part, np.uint8)
    values = values.astype(dtype.newbyteorder("="), copy=False)
    return _plain(torch.from_numpy(values.reshape(shape[::-1]).T if fortran else values.reshape(shape)))


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(file)
        if version == (3, 0):  # only for field names that are not Latin-1
            raise FastclError(f"{where} must be a float matrix (samples, width), got a structured array")
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (FastclError, OSError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # a damaged header fails in many ways, and NumPy's message suggests unpickling it
        raise FastclError(f"{where} cannot be read: its header is not a valid NumPy header") from error
    if not all(type(length) is int and 0 <= length < 1 << 63 for length in shape) or len(shape) > 32:
        raise FastclError(f"{where} cannot be read: its header gives an impossible shape")
    return shape, fortran, dtype


def _described(dtype: np.dtype) -> str:
    if dtype.names:
        return f"a structured array with the fields {listed(map(shown, dtype.names))}"
    return _KINDS.get(dtype.kind) or dtype.newbyteorder("=").name


def _check(shape: Sequence[int], dtype: str, where: str, kind: Kind) -> None:
    """Raise FastclError unless it is a non-empty float matrix (a layer: of two or more dimensions), or integers."""
    if kind == "integers":
        if dtype not in _INTEGERS or len(shape) != 1 or not shape[0]:
            known = ", ".join(_INTEGERS)
            raise FastclError(f"{where} must be (samples,) integers ({known}), got {_text(shape)} {dtype}")
        return
    layers = kind == "layer"
    if dtype not in _FLOATS:
        more = "; in a file of layers every array must be one; to read only one matrix, name it 'features'"
        raise FastclError(
            f"{where} must be a float matrix (samples, width), got {_text(shape)} {dtype}; convert it to float16, "
            f"float32 or float64, for example with x.astype(np.float32){more if layers else ''}"
        )
    if len(shape) < 2 or (len(shape) > 2 and not layers):
        raise FastclError(f"{where} must be a float matrix (samples, width), got {_text(shape)} {dtype}")
    if not math.prod(shape):
        raise FastclError(f"{where} must not be empty, got {_text(shape)} {dtype}")


def _check_memory(needed: int, where: str) -> None:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not available on every system
        return
    if needed > memory:
        raise FastclError(
            f"{where} needs {needed / 2**30:,.1f} GiB, but this machine has {memory / 2**30:,.1f} GiB of memory"
        )


def _text(shape: Sequence[int]) -> str:
    return str(tuple(shape)) if len(shape) <= 8 else f"{len(shape)} dimensions"


def listed(names: Iterable[str]) -> str:
    """The first three names, followed by "..." if there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
