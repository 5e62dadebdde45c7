"""What all tests share: the kernels' mode, real data, the list of source files."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# The tensors here are small: on a shared machine, threads that wait for each other cost more than they give. numpy,
# which Triton's interpreter computes with, reads this when it is imported, and torch imports it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

# Processes that the tests start import this checkout and the tests' helpers, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Triton reads this when a kernel is decorated, its own library included, so it is set before any test module imports
# triton. On a machine with a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import quick_interpreter

    quick_interpreter.install()

torch.set_num_threads(1)

# A shell's background job begins with SIGINT ignored, under nohup with SIGHUP ignored. So would every process that a
# test starts and interrupts.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


# The files whose tests take longest, longest first: begun last, one of them would keep a single worker busy at the end.
LONGEST = (
    "train/test_torchrun.py", "train/test_resume.py", "sweep/test_sweep.py", "bench/test_static.py",
    "bench/test_bench_training.py", "project/test_packaging.py", "losses/test_gathering.py",
    "rowstats/test_triton_operator.py", "rowstats/test_triton_blocks.py", "cli/test_interrupts.py",
    "project/test_types.py", "bench/test_static_gate.py", "rowstats/test_defaults.py", "project/test_structure.py",
    "report/test_report.py", "losses/test_objectives.py", "rowstats/test_gpu.py", "cli/test_cli.py",
    "rowstats/test_rowstats.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; skips tests marked `gpu` where there is none."""
    rank = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a CUDA device, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def data_path() -> Callable[[str], Path]:
    """Function from the name of a real data file to its path; the test that asks for an absent file is skipped."""
    folder = Path(os.environ.get("FASTCL_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"real data file {name} is not in {folder} (set FASTCL_DATA to the folder that has it)")
        return path

    return find


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """Paths, relative to the repository's root, of all files that belong to it: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the list of source files comes from git: {error}")
    return [Path(name) for name in sorted(set(listed.split("\0")) - {""}) if (ROOT / name).is_file()]


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of rows that were computed in tiles."""
    from fastcl.rowstats import chunked

    seen: list[int] = []
    forward = chunked.forward

    def counted(x: Tensor, *rest) -> tuple[Tensor, ...]:
        seen.append(len(x))
        return forward(x, *rest)

    monkeypatch.setattr(chunked, "forward", counted)
    yield seen
