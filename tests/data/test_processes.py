"""What worker processes give back, bit for bit, and how they fail."""

import os

import numpy as np
import pytest

from fastcl import FastclError
from fastcl.data.processes import Processes


class TestResults:
    """What the processes give back, bit for bit."""

    answers = [(np.arange(7), [np.float32([[1, 2], [3, 4]]), np.zeros((0, 3))]), "text", None, np.arange(10**6)]

    @pytest.mark.parametrize("memfd", [True, False])
    def test_any_answer(self, monkeypatch, memfd):
        if not memfd:
            monkeypatch.delattr(os, "memfd_create")
        got = list(Processes(lambda step: self.answers[step], range(4), workers=3, depth=2))
        np.testing.assert_equal(got, self.answers)
        got[3][:] = 5  # the caller's own

    def test_errors_keep_their_type_and_say_where(self):
        with pytest.raises(ZeroDivisionError) as caught:
            list(Processes(lambda step: 1 // step, range(2), workers=1, depth=1))
        assert "in a worker process" in str(caught.value.__cause__) and "1 // step" in str(caught.value.__cause__)

        class Local(Exception):
            """Cannot be pickled."""

        def fail(step):
            raise Local("own words")

        with pytest.raises(RuntimeError, match="^Local: own words$"):
            next(Processes(fail, range(1), workers=1, depth=1))

    def test_no_room_in_shared_memory(self, monkeypatch):
        real = os.posix_fallocate

        def full(file, start, length):
            if length > 10**6:
                raise OSError(28, "No space left on device")
            real(file, start, length)

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            FastclError, match="cannot allocate shared memory for a batch of 8,000,.* bytes .*No space left"
        ):
            next(Processes(lambda step: np.zeros(10**6), range(1), workers=1, depth=1))
