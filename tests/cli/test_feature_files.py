"""Feature files as other programs leave them: the right values, or one error in our words."""

import io
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from fastcl import FastclError
from fastcl.cli.feature_files import read_features, read_layers
from fastcl.cli.main import main
from fastcl.io import arrays

X = np.random.default_rng(0).normal(size=(7, 3))


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'", version: int = 1, more: str = "") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}{more}}}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def packed(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_one_matrix_is_chosen_before_anything_is_converted(tmp_path):
    names, dates = np.array(["a", "b"]), np.array(["2024-01-01"], "M8[D]")
    objects, table = np.array([{}, None], object), np.zeros(2, [("p", "f4"), ("q", "i4")])
    np.savez(tmp_path / "a.npz", names=names, features=X, dates=dates, objects=objects, table=table)
    assert torch.equal(read_features(tmp_path / "a.npz"), torch.from_numpy(X))
    assert read_layers(tmp_path / "a.npz") is None
    packed(tmp_path / "b.npz", **{"features.npy": npy(X), "names.npy": b"damaged", "__MACOSX/._features.npy": b"x"})
    assert torch.equal(read_features(tmp_path / "b.npz"), torch.from_numpy(X))
    kept = {"features": torch.from_numpy(X), "ids": torch.arange(7), "flags": torch.ones(7, dtype=torch.bool)}
    safetensors.torch.save_file(kept, tmp_path / "c.safetensors")
    assert torch.equal(read_features(tmp_path / "c.safetensors"), torch.from_numpy(X))


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f2", "<f4", "<f8"])
def test_byte_orders_fortran_order_and_wrong_endings_give_the_same_values(tmp_path, dtype):
    x = X.astype(dtype)
    want = torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))
    np.save(tmp_path / "c.npy", x)
    np.save(tmp_path / "f.npy", np.asfortranarray(x))
    np.savez_compressed(tmp_path / "z.npz", np.asfortranarray(x))
    (tmp_path / "z.npz").rename(tmp_path / "z.NPY")
    np.save(tmp_path / "n.npy", x)
    (tmp_path / "n.npy").rename(tmp_path / "n.npz")
    safetensors.torch.save_file({"h": want.contiguous()}, tmp_path / "s.npz")
    for name in ("c.npy", "f.npy", "z.NPY", "n.npz", "s.npz"):
        found = read_features(tmp_path / name)
        assert found.dtype == want.dtype and torch.equal(found, want), name
        assert read_layers(tmp_path / name) is None, name
    maps = np.arange(7 * 3 * 2, dtype=dtype).reshape(7, 3, 2)
    np.savez(tmp_path / "maps.npz", a=maps, b=np.asfortranarray(maps))
    for h in read_layers(tmp_path / "maps.npz").values():
        assert torch.equal(h, torch.arange(42, dtype=want.dtype).reshape(7, 6))


def test_bfloat16_is_read_from_safetensors(tmp_path):
    x = torch.from_numpy(X).bfloat16()
    safetensors.torch.save_file({"features": x}, tmp_path / "x.safetensors")
    assert torch.equal(read_features(tmp_path / "x.safetensors"), x)


def damaged(folder) -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, by name: their bytes, and what the error says."""
    float8 = {"h": torch.zeros(4, 2).to(torch.float8_e4m3fn)}
    bomb = packed(folder / "bomb", **{"h.npy": header("(131072, 2)") + bytes(1 << 20)}).read_bytes()
    lies = packed(folder / "lies", **{"h.npy": header("(99999999, 999)")}).read_bytes()
    notes = packed(folder / "notes", **{"notes.txt": b"x"}).read_bytes()
    whole, zipped = npy(X), io.BytesIO()
    np.savez(zipped, h=X)
    zipped, tensors = zipped.getvalue(), safetensors.torch.save({"h": torch.from_numpy(X)})
    flipped = bytearray(zipped)
    flipped[zipped.index(X.tobytes())] ^= 1
    return {
        "empty.npy": (b"", "is empty"),
        "short.npy": (whole[:-8], "its header promises 168 bytes for shape (7, 3), but 160 follow"),
        "header.npy": (whole[:40], "its header is not a valid NumPy header"),
        "two.npy": (whole + whole, "save several arrays as .npz"),
        "huge.npy": (header(f"({1 << 60}, 4)"), "its header promises 18,446,744"),
        "truth.npy": (header("(True, 1)") + bytes(4), "its header gives an impossible shape"),
        "deep.npy": (header("(2,) * 3"), "its header is not a valid NumPy header"),
        "wide.npy": (header(str((1,) * 60)), "impossible shape"),
        "digits.npy": (header(f"(1{'0' * 4000}, 2)"), "impossible shape"),
        "negative.npy": (header("(-1, 2)"), "impossible shape"),
        "long.npy": (header("(1, 2)", more=", " + " " * 20000), "its header is not a valid NumPy header"),
        "nested.npy": (header("(" * 5000), "its header is not a valid NumPy header"),
        "objects.npy": (npy(np.array([[1, None], [2, []]], object)), "got (2, 2) Python objects"),
        "text.npy": (npy(np.array([["a", "b"]])), "got (1, 2) text"),
        "table.npy": (npy(np.zeros((3, 2), [("p", "f4"), ("q", "i4")])), "a structured array with the fields p, q"),
        "unicode.npy": (npy(np.zeros((3, 2), [("\u03c1", "f4")])), "a structured array"),
        "scalar.npy": (npy(np.float32(1)), "got () float32"),
        "vector.npy": (npy(X[:, 0]), "got (7,) float64"),
        "maps.npy": (npy(np.zeros((2, 3, 4))), "got (2, 3, 4) float64"),
        "none.npy": (npy(X[:0]), "must not be empty, got (0, 3) float64"),
        "thin.npy": (npy(X[:, :0]), "must not be empty, got (7, 0) float64"),
        "ints.npy": (npy(np.ones((4, 2), np.int32)), "got (4, 2) int32; convert it to float16, float32 or float64"),
        "bools.npy": (npy(np.ones((4, 2), bool)), "got (4, 2) bool"),
        "complex.npy": (npy(np.ones((4, 2), np.complex64)), "got (4, 2) complex64"),
        "bfloat.npy": (header("(4, 2)", "'|V2'") + bytes(16), "raw bytes (as NumPy keeps bfloat16)"),
        "pickle.npy": (b"\x80\x04K\x01.", "is a pickle, which could run code"),
        "other.npy": (b"\x89HDF\r\n\x1a\n....", "is neither a NumPy nor a safetensors file"),
        "cut.npz": (zipped[:-30], "the .npz is damaged"),
        "flipped.npz": (bytes(flipped), "the .npz is damaged"),
        "none.npz": (notes, "contains no NumPy array"),
        "lies.npz": (lies, "but 0 follow"),
        "bomb.npz": (bomb, "that unpack to 1,048,"),
        "cut.safetensors": (tensors[:-8], "the .safetensors is damaged"),
        "header.safetensors": (struct.pack("<Q", 1 << 40) + b"{}", "the .safetensors is damaged"),
        "none.safetensors": (struct.pack("<Q", 2) + b"{}", "contains no array"),
        "float8.safetensors": (safetensors.torch.save(float8), "got (4, 2) F8_E4M3"),
        "ints.safetensors": (safetensors.torch.save({"h": torch.ones(4, 2).long()}), "got (4, 2) int64"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_what_cannot_be_read_is_refused_in_our_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arrays, "_SMALL", 1 << 19)  # of the real limit, packing alone would take seconds
    for name, (data, message) in damaged(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(FastclError) as error:
            read_features(path)
        assert str(path) in str(error.value) and message in str(error.value), (name, str(error.value))
        assert "allow_pickle" not in str(error.value) and "protocol" not in str(error.value)
        assert main(["align", str(path), str(path)]) == 1, name
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1, printed


def test_a_file_of_layers_names_what_is_no_layer(tmp_path):
    np.savez(tmp_path / "a.npz", h=X, names=np.array(["a"]))
    with pytest.raises(FastclError, match=r"a.npz: 'names' must be .*got \(1,\) text.* name it 'features'"):
        read_layers(tmp_path / "a.npz")
    packed(tmp_path / "twice.npz", **{"h.npy": npy(X)})
    with zipfile.ZipFile(tmp_path / "twice.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("h.npy", npy(X))
    with pytest.raises(FastclError, match="two arrays named 'h'"):
        read_features(tmp_path / "twice.npz")


def test_a_folder_of_layers_takes_what_is_meant_and_names_the_rest(tmp_path, caplog):
    for name in ("l10.npy", "l2.NPY", "l\u00b2.npy"):
        with open(tmp_path / name, "wb") as file:
            file.write(npy(X))
    for name in ("._l2.npy", ".DS_Store", "l3.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    (tmp_path / "older").mkdir()
    assert list(read_layers(tmp_path)) == ["l2", "l10", "l\u00b2"]
    assert "skipped 3 files that are not feature files: " in caplog.text and "._l2" not in caplog.text
    for name in ("l3.pt", "notes.txt", "older"):
        assert name in caplog.text
    (tmp_path / "l10.safetensors").write_bytes(safetensors.torch.save({"h": torch.from_numpy(X)}))
    with pytest.raises(FastclError, match="two files of the same name"):
        read_layers(tmp_path)
    (tmp_path / "l10.safetensors").unlink()
    (tmp_path / "l4.npy").mkdir()
    with pytest.raises(FastclError, match=r"l4.npy is not a regular file"):
        read_layers(tmp_path)
