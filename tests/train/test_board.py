"""Curves for TensorBoard: what its own reader finds, and a disk that is full."""

import os
import resource

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from fastcl import FastclError
from fastcl.train.run_folder.board import Board


def curves(folder):
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path):
    with Board(tmp_path, 0) as board:
        for step in range(4):
            board.scalar("loss/dcl", step / 2, step)
        board.scalar("loss/ce", 7.5, 3)
        board.flush()
        assert curves(tmp_path)["loss/dcl"] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
        board.scalar("loss/ce", 8.5, 4)
    assert curves(tmp_path)["loss/ce"] == [(3, 7.5), (4, 8.5)]


def test_a_continued_run_takes_the_place_of_what_was_trained_since(tmp_path):
    with Board(tmp_path, 0) as board:
        for step in range(4):
            board.scalar("loss", step, step)
    with Board(tmp_path, 2) as board:
        board.scalar("loss", 10, 2)
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    events = [Event.FromString(data) for data in RawEventFileLoader(str(second)).Load()]
    assert [e.step for e in events] == [2, 2, 2] and events[1].session_log.status == 1 and first != second
    assert curves(tmp_path)["loss"] == [(0, 0), (1, 1), (2, 10)]


def test_points_reach_the_disk_while_an_epoch_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcl.train.run_folder.board._WAIT", 0.0)
    with Board(tmp_path, 0) as board:
        board.scalar("loss", 1.5, 0)
        assert curves(tmp_path)["loss"] == [(0, 1.5)]


def test_a_full_disk_is_one_error_at_the_next_write(tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    board = Board(tmp_path, 0)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        for step in range(10_000):
            board.scalar("loss", step, step)
        with pytest.raises(FastclError, match=f"cannot write {tmp_path}: File too large"):
            board.flush()
        with pytest.raises(KeyError), board:  # the first error counts
            raise KeyError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr() == ("", "")


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with Board(folder, 0) as board:
        board.scalar("loss", 1.5, 0)
    assert len(list(folder.iterdir())) == 1
