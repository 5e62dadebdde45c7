"""How much an image file may ask for: pixels, unpacked bytes, and levels that 16-bit files leave."""

import io
import resource
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from small_images import noise, pixels_by_id, png, write_tree, write_zip
from test_sources_archives import cifar_arrays, omniglot_arrays, save, small_cifar

from fastcl.config.settings import MAX_PIXELS
from fastcl.data.limits import most_bytes
from fastcl.data.sources import pixels
from fastcl.data.sources.load import load
from fastcl.data.sources.trees import archives
from fastcl.errors import FastclError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits from (H, W, C) values; Pillow writes grey ones only."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(values: np.ndarray, greatest: int) -> bytes:
    height, width = values.shape
    return f"P5 {width} {height} {greatest}\n".encode() + values.astype(">u2").tobytes()


def tiff(values: np.ndarray, order: str) -> bytes:
    """An uncompressed grey TIFF of 16 bits in either byte order."""
    height, width = values.shape
    tags = (
        (256, width),
        (257, height),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, height),
        (279, 2 * values.size),
    )
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags)) + entries + b"\0" * 4
    return head.ljust(200, b"\0") + values.astype(order + "u2").tobytes()


def read(tmp_path, data: bytes, extension: str) -> np.ndarray:
    source = write_tree(tmp_path / "t", {f"{c}/{i}.{extension}": data for c in "ab" for i in range(2)})
    return load(source).train.image(0)


class TestSixteenBits:
    full = np.random.default_rng(0).integers(0, 65536, (6, 5))
    full[0, 0] = 65535

    @pytest.mark.parametrize(("encode", "extension"), [
        (lambda v: deep_png(v[..., None]), "png"), (lambda v: pgm(v, 65535), "pgm"), (lambda v: tiff(v, "<"), "tif"),
        (lambda v: tiff(v, ">"), "tif"), (lambda v: deep_png(np.repeat(v[..., None], 3, 2)), "png"),
        (lambda v: deep_png(np.stack([v, v, v, 0 * v + 65535], 2)), "png"),
    ])  # fmt: skip
    def test_the_high_byte_is_kept_and_data_of_fewer_bits_are_refused(self, tmp_path, encode, extension):
        got = read(tmp_path, encode(self.full), extension)
        np.testing.assert_array_equal(got, np.repeat((self.full // 256)[..., None], 3, 2))
        for bits, few in ((10, 1023), (12, 4095), (14, 16383)):
            with pytest.raises(FastclError, match=r"a/\d.*16-bit pixels reach only .* of 65,535, .*full range"):
                read(tmp_path, encode(self.full >> 16 - bits), extension)
            assert self.full.max() >> 16 - bits == few
        assert (read(tmp_path, encode(0 * self.full), extension) == 0).all(), "a black image is one"

    @pytest.mark.parametrize("greatest", [300, 1023, 4095, 65535])
    def test_a_pgm_is_scaled_by_its_greatest_value(self, tmp_path, greatest):
        values = np.random.default_rng(1).integers(0, greatest + 1, (6, 5))
        values[0, 0] = greatest
        got = read(tmp_path, pgm(values, greatest), "pgm")[..., 0].astype(np.float64)
        assert np.abs(got - values * 255.0 / greatest).max() <= 1

    def test_bands_change_no_pixel(self, monkeypatch):
        palette = Image.fromarray(noise(0, 40, 30)).quantize(16)
        palette.info["transparency"] = 3
        pictures = [palette, *(Image.fromarray(noise(k, 40, 30, c)) for k, c in enumerate((3, 4)))]
        pictures += [
            Image.fromarray(noise(5, 40, 30)[..., 0]),
            Image.frombytes("CMYK", (30, 40), noise(6, 40, 30, 4).tobytes()),
        ]
        whole = [pixels.decode(p, c) for p in pictures for c in (1, 3)]
        monkeypatch.setattr(pixels, "_BAND", 70)
        for a, b in zip(whole, [pixels.decode(p, c) for p in pictures for c in (1, 3)], strict=True):
            np.testing.assert_array_equal(a, b)


class TestPixels:
    @pytest.fixture(params=["tree", "zip", "torchvision"])
    def large(self, request, tmp_path):
        """A source with one image of 40 x 50, and options."""
        files = {f"{c}/{i}.png": png(noise(i)) for c in "ab" for i in range(10)} | {"a/9.png": png(noise(0, 40, 50))}
        if request.param == "zip":
            return write_zip(tmp_path / "z.zip", files), {}
        source = write_tree(tmp_path / "t", files)
        return ("torchvision:ImageFolder", {"root": tmp_path / "t"}) if request.param == "torchvision" else (source, {})

    def test_an_image_of_too_many_pixels(self, large):
        source, options = large
        load(source, **options, max_pixels=2000)
        with pytest.raises(
            FastclError, match=r"(a/9.png|item 9).*40 x 50 is 2,000 pixels, more than data.max_pixels \(1,999\)"
        ):
            load(source, **options, max_pixels=1999)
        if not options:
            assert list(load(source, max_pixels=1999, corrupt="skip").skipped) == [9]

    def test_a_picture_is_not_decoded_first(self, tmp_path):
        side = int(MAX_PIXELS**0.5) + 1
        bomb = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", b"")
        )
        with pytest.raises(FastclError, match=rf"{side} x {side} is .* more than data.max_pixels \({MAX_PIXELS:,}\)"):
            load(write_tree(tmp_path, {f"{c}/{i}.png": bomb for c in "ab" for i in range(2)}))


class TestZips:
    def test_entries_that_share_bytes(self, tmp_path):
        """Sixty names for one packed stretch of 20 MiB of zeros."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        raw = bytes(20 << 20)
        packed = packer.compress(raw) + packer.flush()
        facts = (0, 8, 0, 0, zlib.crc32(raw), len(packed), len(raw))
        local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, *facts, 7, 0) + b"a/0.png" + packed
        names = [f"{c}/{i}.png".encode() for c in "ab" for i in range(30)]
        central = b"".join(
            struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, *facts, len(n), 0, 0, 0, 0, 0, 0) + n for n in names
        )
        end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, len(names), len(names), len(central), len(local), 0)
        (tmp_path / "z.zip").write_bytes(local + central + end)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(FastclError, match="z.zip: the entries 'a/0.png' and 'a/1.png' overlap"):
            load(f"folder:{tmp_path / 'z.zip'}")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 << 10  # KiB

    def test_an_entry_that_says_it_is_larger_than_any_image(self, tmp_path):
        source = write_zip(
            tmp_path / "z.zip", {"a/0.png": b"x", **{n: png(noise(1)) for n in ("a/1.png", "b/0.png", "b/1.png")}}
        )
        data = bytearray((tmp_path / "z.zip").read_bytes())
        size = data.index(b"PK\1\2") + 24
        for stated, message in (
            (most_bytes(100) + 1, "data.max_pixels needs"),
            (most_bytes(100), "a/0.png: checksum .* over 1 bytes, expected"),
        ):
            data[size : size + 4] = struct.pack("<I", stated)
            (tmp_path / "z.zip").write_bytes(data)
            with pytest.raises(FastclError, match=message):
                load(source, max_pixels=100, test_fraction=0.9)

    def test_what_is_no_image_is_not_unpacked(self, tmp_path, monkeypatch):
        files = {f"{c}/{i}.png": png(noise(i)) for c in "ab" for i in range(8)} | {"a/9.png": bytes(30 << 20)}
        source = write_zip(tmp_path / "z.zip", files, zipfile.ZIP_DEFLATED)
        given = []
        real = archives.zlib.decompressobj

        class Counting:
            def __init__(self, *args):
                self.inner = real(*args)

            def decompress(self, *args):
                given.append(len(data := self.inner.decompress(*args)))
                return data

            def __getattr__(self, name):
                return getattr(self.inner, name)

        monkeypatch.setattr(archives.zlib, "decompressobj", Counting)
        assert list(load(source, corrupt="skip").skipped) == [8]
        assert max(given) <= 1 << 20 and sum(given) < 8 << 20

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    @pytest.mark.parametrize("delta", [-1, 1])
    def test_sizes_that_do_not_hold(self, tmp_path, method, delta):
        source = write_zip(
            tmp_path / "z.zip", {f"{c}/{i}.png": png(noise(i, 300, 300)) for c in "ab" for i in range(2)}, method
        )
        data = bytearray((tmp_path / "z.zip").read_bytes())
        size = data.index(b"PK\1\2") + 24
        (stated,) = struct.unpack("<I", data[size : size + 4])
        data[size : size + 4] = struct.pack("<I", stated + delta)
        (tmp_path / "z.zip").write_bytes(data)
        with pytest.raises(FastclError, match="z.zip!a/0.png: (checksum|unpacks to more than)"):
            pixels_by_id(load(source))

    def test_entries_are_files_in_every_respect(self, tmp_path):
        payload = noise(3, 500, 700).tobytes()
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            write_zip(tmp_path / "z.zip", {"a/0.png": payload, "a/1.png": b""}, method)
            store = archives.Zip(tmp_path / "z.zip", MAX_PIXELS)
            with store.open(0) as file:
                assert file.read(10) == payload[:10]
                file.seek(-7, io.SEEK_END)
                assert file.read() == payload[-7:] and file.read(1) == b""
                file.seek(100_000)
                assert file.read(5) == payload[100_000:100_005] and file.tell() == 100_005
                file.seek(0)
                assert file.read() == payload
            assert store.data(0) == payload and store.data(1) == b""


class TestArchives:
    @pytest.mark.parametrize(("kind", "arrays"), [("omniglot", omniglot_arrays()[0]), ("cifar10", small_cifar())])
    @pytest.mark.parametrize("name", ["label", "class_names"])
    def test_shapes_are_refused_before_anything_is_unpacked(self, tmp_path, kind, arrays, name):
        huge = np.zeros(30 << 20, np.uint8) if name == "label" else np.array(["x" * 2000] * 3)
        source = f"{kind}:{save(tmp_path / 'x.npz', {**arrays, name: huge})}"
        start = time.process_time()
        with pytest.raises(FastclError, match=f"{name} must be|labels but only"):
            load(source)
        assert time.process_time() - start < 5

    def test_names_are_a_list_of_texts(self, tmp_path):
        arrays = cifar_arrays([png(noise(i, 32, 32)) for i in range(8)], [0, 0, 0, 1, 1, 1, 0, 1], [0] * 6 + [1, 1])
        with pytest.raises(FastclError, match=r"class_names must be a list of names, got \(2,\) int64"):
            load(f"cifar10:{save(tmp_path / 'c.npz', {**arrays, 'class_names': np.arange(2)})}")
