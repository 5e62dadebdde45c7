"""What a run reads: images that cannot be decoded, decoded images kept, the choice of a renderer, workers."""

import dataclasses
import json
import logging
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import noise, png, write_tree
from tiny_run import results, tiny_config

from fastcl import FastclError
from fastcl.data import (
    Split,
    TorchvisionRenderer,
    ViewPlan,
    ViewSpec,
    choose_renderer,
    keep_decoded,
    load,
    make_renderer,
)
from fastcl.data.renderers import choose as module
from fastcl.report import write_report
from fastcl.train import Lockstep
from fastcl.train.run_folder.identity import same_data, settings
from fastcl.train.run_folder.records import locked

CPU = torch.device("cpu")
SPEC = ViewSpec.preset("cifar", size=8)


def jpeg(seed, height=12, width=10):
    buffer = BytesIO()
    Image.fromarray(noise(seed, height, width)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def split():
    images = [noise(k, 6 + k % 5, 7 + k % 3) for k in range(26)]
    sizes = np.array([image.shape[:2] for image in images])
    return Split(np.arange(26) * 3 + 1, np.arange(26) % 4, sizes, lambda i: images[i])


@pytest.fixture
def tree(tmp_path):
    """Two classes of eight JPEG files; one is cut short, one has no header."""
    files = {f"{name}/{k}.jpg": jpeg(10 * c + k, 40, 30) for c, name in enumerate("ab") for k in range(8)}
    files["a/3.jpg"], files["b/6.jpg"] = files["a/3.jpg"][:-200], b"no image"
    return write_tree(tmp_path / "tree", files)


def test_corrupt_images_stop_or_leave_their_split(tree, tmp_path, caplog):
    with pytest.raises(FastclError, match=r"b/6.jpg"):
        load(tree)
    (tmp_path / "tree" / "b" / "6.jpg").write_bytes(jpeg(16, 40, 30)[:-200])
    whole = load(tree)
    ids = {"a/3.jpg": 3, "b/6.jpg": 14}
    for name, i in ids.items():
        (found,) = [(s, k) for s in (whole.train, whole.test) for k in np.flatnonzero(s.ids == i)]
        with pytest.raises(FastclError, match=f"{name}.*corrupt=skip leaves out images that cannot be decoded"):
            found[0].image(int(found[1]))
    (tmp_path / "tree" / "b" / "6.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "fastcl"):
        left = load(tree, corrupt="skip")
    assert list(left.skipped) == [3, 14] and all(name in caplog.text for name in ids)
    assert "a/3.jpg: OSError: image file is truncated" in left.skipped[3] and "b/6.jpg" in left.skipped[14]
    assert "corrupt=" not in caplog.text + str(left.skipped)
    assert "images cannot be decoded and are left out" in caplog.text
    for name in ("train", "test"):
        before, after = getattr(whole, name), getattr(left, name)
        kept = ~np.isin(before.ids, (3, 14))
        assert np.array_equal(after.ids, before.ids[kept]) and np.array_equal(after.labels, before.labels[kept])
        for k, i in enumerate(np.flatnonzero(kept).tolist()):
            assert np.array_equal(after.image(k), before.image(i))
    again = load(tree, corrupt="skip", skipped=left.skipped)
    assert np.array_equal(again.train.ids, left.train.ids) and again.skipped == left.skipped
    with pytest.raises(FastclError, match="data.corrupt must be 'stop' or 'skip', got 'ignore'"):
        load(tree, corrupt="ignore")


def test_a_class_without_a_readable_image(tmp_path):
    files = {f"{split}/{name}/{k}.png": png(noise(k)) for split in ("train", "test") for name in "ab" for k in (0, 1)}
    files["test/b/0.png"] = files["test/b/1.png"] = files["test/b/0.png"][:60]
    with pytest.raises(FastclError, match="class 'b' has no readable test images"):
        load(write_tree(tmp_path, files), corrupt="skip")


def test_a_run_leaves_out_what_it_left_out_when_it_began(tree, tmp_path, monkeypatch):
    config = tiny_config(data__source=tree, data__classes="none", data__corrupt="skip", views__preset="cifar",
                         train__batch_size=4, train__epochs=1, train__models=["dcl"], train__controls=[])  # fmt: skip
    run = Lockstep(config, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(described["skipped"]) == ["3", "14"] and "a/3.jpg" in described["skipped"]["3"]
    assert described["data"]["train"] + described["data"]["test"] == 14
    run.run()
    page = write_report(tmp_path / "run").read_text()
    assert "b/6.jpg" in page and "skipped<" in page
    monkeypatch.setattr("fastcl.data.sources.load.unreadable", lambda *_: pytest.fail("checked again"))
    assert list(Lockstep(config, tmp_path / "run").data.skipped) == [3, 14]


def test_one_class_is_too_few_for_models_that_use_classes(tmp_path):
    source = write_tree(tmp_path / "tree", {f"all/{k}.png": png(noise(k)) for k in range(16)})
    tiny = dict(data__source=source, data__classes="none", views__preset="cifar", train__batch_size=4, train__epochs=1)
    for models, using in ((["dcl", "nscl", "ce"], "nscl, ce"), (["supcon"], "supcon")):
        with pytest.raises(FastclError, match=f"the models {using} need at least 2 classes; tree has 1: 'all'"):
            Lockstep(tiny_config(**tiny, train__models=models, train__controls=[]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Lockstep(tiny_config(**tiny, train__models=["dcl"], train__controls=[]), tmp_path / "run")


def test_what_a_run_did_not_take_is_in_its_description(tmp_path):
    files = {f"{c}/{k}.png": png(noise(k)) for c in "ab" for k in range(8)} | {"a/notes.txt": b"x"}
    tiny = dict(data__source=write_tree(tmp_path / "tree", files), data__classes="none", views__preset="cifar",
                train__batch_size=4, train__epochs=1, train__models=["dcl"], train__controls=[])  # fmt: skip
    run = Lockstep(tiny_config(**tiny), tmp_path / "run")
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["left_out"] == list(run.data.left_out) == ["1 files that are not images (a/notes.txt)"]
    with pytest.raises(FastclError, match=r"30 pixels, more than data.max_pixels \(29\)"):
        Lockstep(tiny_config(**tiny, data__max_pixels=29), tmp_path / "other")
    Lockstep(tiny_config(**tiny, data__max_pixels=31), tmp_path / "run")  # a bound is no other run


@pytest.mark.parametrize("trained", (False, True))
def test_a_run_without_a_finished_epoch_gives_way(tree, tmp_path, trained):
    """As one does that stopped at an image; a run that has trained anything does not."""
    out = tmp_path / "run"
    tiny = dict(data__classes=2, train__batch_size=64, train__epochs=2, train__models=["dcl", "nscl"],
                train__controls=[])  # fmt: skip
    first = Lockstep(tiny_config(**tiny), out)
    first._measure({})
    first._checkpoint()
    if trained:
        first.run()
    config = tiny_config(**tiny, train__seed=1)
    if trained:
        with pytest.raises(FastclError, match="contains another run"):
            Lockstep(config, out)
        return
    with locked(out), pytest.raises(FastclError, match="another process is training in"):
        Lockstep(config, out)
    assert json.loads((out / "run.json").read_text())["seed"] == 7
    Lockstep(config, out).run()
    assert json.loads((out / "run.json").read_text())["seed"] == 1
    Lockstep(config, tmp_path / "fresh").run()
    assert results(out) == results(tmp_path / "fresh")


def test_two_runs_in_one_folder_never_mix(tmp_path):
    """Whoever trains first has the folder, whatever the other one wrote into it meanwhile."""
    out, tiny = tmp_path / "run", dict(data__classes=2, train__epochs=1, train__models=["dcl"], train__controls=[])
    first, second = (Lockstep(tiny_config(**tiny, train__seed=seed), out) for seed in (7, 1))
    first.run()
    assert json.loads((out / "run.json").read_text())["seed"] == 7
    with pytest.raises(FastclError, match=r"contains another run, which differs in .*seed \(7 there, 1 here\)"):
        second.run()


def test_other_images_in_the_folder_are_another_run(tmp_path):
    files = {f"{name}/{k}.png": png(noise(k, 12, 12)) for name in "ab" for k in range(6)}
    config = tiny_config(data__source=write_tree(tmp_path / "tree", files), data__classes="none", train__batch_size=4,
                         views__preset="cifar", train__epochs=1, train__models=["dcl"], train__controls=[])  # fmt: skip
    Lockstep(config, tmp_path / "run").run()
    write_tree(tmp_path / "tree", {"a/6.png": png(noise(6, 12, 12)), "b/6.png": png(noise(7, 12, 12))})
    with pytest.raises(FastclError, match=r"another run, which differs in data.t"):
        Lockstep(config, tmp_path / "run")


@pytest.mark.parametrize("change", ({"seed": 1}, {"source": "digits"}))
def test_what_another_run_skipped_is_no_news(tree, tmp_path, change):
    other = {"data__source": change["source"]} if "source" in change else {"train__seed": change["seed"]}
    config = tiny_config(data__source=tree, data__classes="none", views__preset="cifar", train__models=["dcl"])
    run = {"config": settings(config), "seed": config.train.seed}
    assert same_data(run, config)
    assert not same_data(run, tiny_config(**{"data__source": tree, "data__classes": "none"} | other))


def test_a_file_cut_after_its_thumbnail_is_named(tmp_path):
    """The thumbnail in its header has an end of its own."""
    small, buffer = jpeg(0, 8, 8), BytesIO()
    exif = b"Exif\0\0" + small
    Image.fromarray(noise(1, 60, 50)).save(buffer, "JPEG", progressive=True, exif=exif)
    whole = buffer.getvalue()
    assert small in whole and whole.count(b"\xff\xd9") == 2
    half = len(whole) // 2
    for data, found in ((whole, True), (whole + b"junk", True), (whole[:-40], False), (whole[:half], False)):
        files = {f"{name}/{k}.jpg": data for name in "ab" for k in range(2)}
        split = load(write_tree(tmp_path / f"{len(data)}", files)).train
        assert (split.encoded(0) is not None) == found, len(data)


def test_an_image_that_was_replaced_is_named(split):
    renderer = TorchvisionRenderer(split, SPEC, CPU)
    params = [ViewPlan(SPEC, 0).draw(0, split.ids[:3], 0, split.sizes[:3])]
    images = [split.read(k) for k in range(3)]
    images[1] = images[1][:-1]
    renderer.split = dataclasses.replace(split, read=lambda i: images[i])
    with pytest.raises(FastclError, match=r"image of sample id 4 has size \(6, 8\), but its header said \(7, 8\)"):
        renderer(np.arange(3), params)


def test_small_sets_are_kept_decoded_and_large_ones_stay_files(tmp_path):
    files = {f"{name}/{k}.jpg": jpeg(k, 9 + k, 20 - k) for name in "ab" for k in range(5)}
    data = load(write_tree(tmp_path, files))
    size = int(data.train.sizes.prod(1).sum()) * 3
    assert keep_decoded(data.train, 3, size - 1) is data.train
    kept = keep_decoded(data.train, 3, size)
    wanted = [data.train.image(k) for k in range(len(kept))]
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    for k, image in enumerate(wanted):
        assert np.array_equal(kept.image(k), image)
        kept.image(k)[:] = 0  # the caller's own copy
        assert np.array_equal(kept.image(k), image)


def test_renderers_by_name(split, monkeypatch):
    assert isinstance(make_renderer("auto", split, SPEC, CPU, 2), TorchvisionRenderer)
    with pytest.raises(FastclError, match="data.renderer: unknown renderer 'tritn'; did you mean 'triton'"):
        make_renderer("tritn", split, SPEC, CPU)
    with pytest.raises(FastclError, match="'triton' cannot be used here: .*the same size, got 6x7 and 7x8|CUDA device"):
        make_renderer("triton", split, SPEC, CPU)
    usable = {"triton", "dali", "torchvision"}
    monkeypatch.setattr(module, "obstacle", lambda name, *_: None if name in usable else "absent")
    facts = split.ids, split.labels, split.sizes, split.read
    files = Split(*facts, lambda i: b"jpeg")
    some, most = (Split(*facts, lambda i, n=n: b"jpeg" if i < n else None) for n in (9, 17))
    for gone, splits, name in (
        (None, (split, files), "triton"), ("triton", (files, files), "dali"),
        (None, (files, split), "torchvision"),  # one split has no files: both go by the same renderer
        (None, (some,), "torchvision"), (None, (most,), "dali"),
    ):  # fmt: skip
        usable.discard(gone)
        assert choose_renderer("auto", splits, SPEC, torch.device("cuda")) == name
    with pytest.raises(FastclError, match="'triton' cannot be used here: absent"):
        choose_renderer("triton", (split,), SPEC, CPU)


def test_workers_change_no_bit_and_another_renderer_is_another_run(tmp_path):
    config = tiny_config(train__epochs=1, train__models=["dcl", "nscl"], data__renderer="torchvision")
    alone, ahead = tmp_path / "alone", tmp_path / "ahead"
    Lockstep(config, alone).run()
    Lockstep(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2)), ahead).run()
    assert results(ahead) == results(alone)
    for row in map(json.loads, (ahead / "timing.jsonl").read_text().splitlines()):
        assert 0 < row["rendering_seconds"] < row["seconds"]
    again = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1, renderer="auto"))
    assert Lockstep(again, alone).inputs.renderer == "torchvision"  # neither key changes a number
    described = json.loads((alone / "run.json").read_text())
    (alone / "run.json").write_text(json.dumps(described | {"renderer": "dali"}))
    with pytest.raises(FastclError, match=r"another run.*renderer \('dali' there, 'torchvision' here\)"):
        Lockstep(config, alone)
