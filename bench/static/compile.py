"""The compile worker of `bench.static`. It needs only Triton, so it runs in any environment.

`python -m bench.static.compile` reads jobs, one JSON object per line, and answers each with a line: facts about the
kernel, or why there is none. Its first line names the version of Triton.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bench.static import sass

# The type of an argument, "constexpr" if its value is compiled in; for a tuple the types of its fields.
Signature: TypeAlias = "str | dict[str, Signature]"

LOG = "ptxas.log"  # in Triton's cache, next to its kernel
# Facts are cached there too, keyed by a hash of the code that reads machine code: otherwise disassembly would take most
# of the time of a second run.
_READERS = (Path(__file__), Path(sass.__file__))
LISTING = "listing.gz"  # the disassembly, there too
FACTS = f"facts-{hashlib.sha256(b''.join(path.read_bytes() for path in _READERS)).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Job:
    """A kernel as Triton would compile it for a launch; every field is JSON-serialisable.

    Attributes:
        root: folder to import `module` from.
        signature: types by parameter.
        constants: compiled-in values by path (a parameter, or "parameter.field"); a tuple becomes a list.
        divisible: paths of the arguments that are multiples of 16.
        arch: architecture such as 90.
    """

    root: str
    module: str
    kernel: str
    signature: dict[str, Signature]
    constants: dict[str, Any]
    divisible: list[str]
    arch: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Facts:
    """Properties of a compiled kernel.

    Attributes:
        stack: bytes of a thread's stack and other local memory, where spilled registers are kept.
        local: number of instructions that store to or load from local memory.
        shared: bytes of shared memory per program.
        tensor_memory: columns of sm_100's tensor memory.
        dot: whether the kernel contains a tl.dot.
        tensor: number of tensor-core instructions by family, as in `sass.TENSOR`.
        register_operand: number of WGMMA whose first operand is in registers.
        waits: number of waits for WGMMA.
        broken, chained: see `sass.broken_chains`.
        messages: ptxas messages about WGMMA that it serialised.
        hazards: see `sass.hazards` and `sass.early_releases`.
        exponentials: see `sass.exponentials_in_a_loop`.
    """

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    warps: int
    dot: bool
    tensor: dict[str, int]
    register_operand: int
    waits: int
    broken: int
    chained: int
    messages: list[str]
    hazards: list[str]
    exponentials: int | None


def obstacle() -> str | None:
    """Why the installed Triton cannot be used by the gate, or None."""
    import triton

    try:
        from triton import knobs

        knobs.nvidia.dump_ptxas_log  # noqa: B018
    except (ImportError, AttributeError):
        return f"Triton 3.5 or newer is needed, the first that tells what ptxas said; this is {triton.__version__}"
    return None


def build(job: Job) -> tuple[Facts, str]:
    """Compile a job and examine its machine code; cached results are reused.

    Returns:
        The facts, and the file of the disassembly (gzip), which is in Triton's cache.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    if job.root not in sys.path:
        sys.path.insert(0, job.root)
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = (_gluon_source() if getattr(kernel, "is_gluon", bool)() else ASTSource)(
        kernel,
        {name: _kind(kind) for name, kind in job.signature.items()},
        {_place(job.signature, path): _constant(value) for path, value in job.constants.items()},
        {_place(job.signature, path): [["tt.divisibility", 16]] for path in job.divisible},
    )
    target = GPUTarget("cuda", job.arch, 32)
    compiled, log = _compile(source, target, {"num_warps": job.warps, "num_stages": job.stages})
    cache = get_cache_manager(compiled.hash)
    kept, listing = cache.get_file(FACTS), cache.get_file(LISTING)
    if kept and listing:
        return Facts(**json.loads(Path(kept).read_text(encoding="utf-8"))), listing
    usage, text = _disassemble(compiled.asm["cubin"])
    facts = _facts(compiled, log, usage, text)
    listing = cache.put(gzip.compress(text.encode(), mtime=0), LISTING)
    cache.put(json.dumps(asdict(facts)), FACTS, binary=False)
    return facts, listing


def _gluon_source() -> type:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _place(signature: Any, path: str) -> tuple[int, ...]:
    """A path in Triton's form: the index of the parameter, of its field, and so on."""
    place = []
    for name in path.split("."):
        place.append(list(signature).index(name))
        signature = signature[name]
    return tuple(place)


def _kind(kind: Signature) -> Any:
    if isinstance(kind, str):
        return kind
    kinds = tuple(map(_kind, kind.values()))
    return kinds if not kind or "0" in kind else namedtuple("Argument", kind)(*kinds)


def _constant(value: Any) -> Any:
    return tuple(map(_constant, value)) if isinstance(value, list) else value


def _compile(source: Any, target: Any, options: dict[str, int]) -> tuple[Any, str]:
    """The kernel and the ptxas log, which Triton prints but does not keep."""
    import triton
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    knobs.nvidia.dump_ptxas_log = True
    for anew in (False, True):  # a kernel cached by another program has no log
        knobs.compilation.always_compile = anew
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            compiled = triton.compile(source, target=target, options=options)
        cache = get_cache_manager(compiled.hash)
        if log := printed.getvalue():
            cache.put(log, LOG, binary=False)
            return compiled, log
        if kept := cache.get_file(LOG):
            return compiled, Path(kept).read_text(encoding="utf-8")
    raise RuntimeError("ptxas gave no report")


def _facts(compiled: Any, log: str, usage: str, text: str) -> Facts:
    code = sass.blocks(text)
    # A device function that was not inlined has its own line.
    used = [[int(n) for n in match] for match in re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)]
    if not used or not code:
        raise RuntimeError(f"the disassembler shows no code: {(usage + text)[:200]!r}")
    broken, chained = sass.broken_chains(code)
    metadata = compiled.metadata
    return Facts(
        registers=max(registers for registers, _, _ in used),
        stack=sum(stack + local for _, stack, local in used),
        local=sass.count(code, r"(?:STL|LDL)\b"),
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        warps=metadata.num_warps,
        dot=any(name in _first_stage(compiled) for name in ("tt.dot", "ttng.warp_group_dot")),
        tensor={name: sass.count(code, pattern) for name, pattern in sass.TENSOR.items()},
        register_operand=sass.register_operands(code),
        waits=sass.count(code, r"WARPGROUP\.DEPBAR"),
        broken=broken,
        chained=chained,
        messages=sorted(set(re.findall(r"\(C75\d\d\).*", log))),
        hazards=sass.hazards(code) + sass.early_releases(code),
        exponentials=sass.exponentials_in_a_loop(code),
    )


def _first_stage(compiled: Any) -> str:
    """The kernel before Triton's passes; a kernel in Gluon states its layouts from the start."""
    return compiled.asm.get("ttir") or compiled.asm["ttgir"]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, from the tools bundled with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            [knobs.nvidia.nvdisasm.path, "-c", "-ndf", "-hex", file.name],
        )
        done = [
            subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
            for command in commands
        ]
    for one in done:
        if one.returncode:
            raise RuntimeError(f"{Path(one.args[0]).name} failed: {one.stderr.strip() or one.stdout.strip()}")
    return done[0].stdout, done[1].stdout


def main() -> None:
    """Answer jobs until there are no more."""
    # Redirect output of Triton and its tools to standard error, so that only answers go to standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import triton

    if reason := obstacle():
        sys.exit(reason)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"triton": triton.__version__})
    for line in sys.stdin:
        try:
            facts, listing = build(Job(**json.loads(line)))
            answer({"facts": asdict(facts), "listing": listing})
        except Exception as error:  # Triton raises many error classes, and a failed job is an answer too
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
