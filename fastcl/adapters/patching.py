"""`fastcl.patch`: methods of other libraries replaced in place, so that a program need not be edited."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module, metadata
from types import FunctionType, TracebackType
from typing import Any

from fastcl.adapters.targets import DISTRIBUTIONS, TARGETS, Target
from fastcl.errors import FastclError, one_of

VARIABLE = "FASTCL_PATCH"  # of the environment: libraries, separated by commas


class Patch:
    """What a call of `patch` has replaced; undone by `restore`, or at the end of a `with` block.

    Attributes:
        replaced: what computes with fastcl now, such as "lightly.loss.ntx_ent_loss:NTXentLoss.forward".
    """

    def __init__(self, replaced: Iterable[str], report: str) -> None:
        self.replaced = tuple(replaced)
        self._report = report
        self._held = list(self.replaced)

    def restore(self) -> None:
        """Undo this patch. Originals come back with the last patch that replaces them; a second call does nothing."""
        while self._held:
            _release(self._held.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        return self._report

    def __repr__(self) -> str:
        return f"<fastcl.patch {'of' if self._held else 'restored,'} {self._report}>"


@dataclass
class _Active:
    """A replacement in place, and how many patches want it."""

    target: Target
    put_back: Callable[[], None]
    stand_in: Callable[..., Any]
    holders: int = 0


_active: dict[str, _Active] = {}


def patch(*libraries: str, force: bool = False) -> Patch:
    """Let the losses of other libraries compute with fastcl, wherever a program uses them.

    Methods are replaced on their classes and functions in place: names that are already imported, instances that exist
    and subclasses follow. What fastcl does not support, or on a CPU is slower at (few rows), the original computes. A
    function that torch.compile has already compiled is compiled again.

    Args:
        libraries: "inf_cl", "info_nce", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers",
            "solo", "stable_pretraining", "vissl", or the names under which they are installed, such as "solo-learn";
            imported here.
        force: also replace methods whose source is not that of a release that fastcl was compared with.

    Returns:
        The patch: its text says what was replaced, `restore()` or the end of a `with` block undoes it.

    Raises:
        FastclError: no library, an unknown one, one that cannot be imported, or an unknown source without `force`;
            nothing is replaced then.
    """
    if not libraries:
        raise FastclError(one_of("libraries", sorted(TARGETS), None))
    found = {library: _targets(library, force) for library in dict.fromkeys(map(_module, libraries))}
    chosen = [target for targets in found.values() for target in targets]
    for target in chosen:
        if target.place not in _active:
            _active[target.place] = _replace(target, *_owner(target.place))
        _active[target.place].holders += 1
    return Patch((target.place for target in chosen), "; ".join(_line(*one) for one in found.items()))


def patch_from_environment() -> None:
    """Patch what FASTCL_PATCH names, and tell."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if names:
        tell(patch(*names))


def tell(done: Patch) -> None:
    """Write to stderr what was replaced; of the processes of torchrun only the first does, and no worker of it."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(f"fastcl: {done}", file=sys.stderr)


def call(place: str, *args: Any, **options: Any) -> Any:
    """What a function replaced in place does."""
    return _active[place].stand_in(*args, **options)


def digest(sources: Iterable[str]) -> str:
    """Of the source text of functions and methods; "" if it cannot be read."""
    found = hashlib.sha256()
    for source in sources:
        try:
            owner, name = _owner(source)
            # Of the code itself: inspect would look through a decorator to what it wraps.
            found.update(inspect.getsource(getattr(owner, name).__code__).encode())
        except (AttributeError, ImportError, OSError, TypeError):
            return ""
    return found.hexdigest()[:16]


def _owner(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    owner, (*outer, name) = import_module(module), path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _module(library: str) -> str:
    """The module of a library that may be named as a distribution."""
    return next((module for module, name in DISTRIBUTIONS.items() if name == library), library)


def _targets(library: str, force: bool) -> list[Target]:
    """What to replace of the installed release: for each place the row with its source, or forced the first."""
    if library not in TARGETS:
        raise FastclError(one_of("library", sorted(TARGETS), library))
    releases = {release for target in TARGETS[library] for release in target.digests}
    found: list[Target] = []
    for place in dict.fromkeys(target.place for target in TARGETS[library]):
        rows = [target for target in TARGETS[library] if target.place == place]
        known = list(dict.fromkeys(release for target in rows for release in target.digests))
        try:
            _check_place(library, rows[0])
        except (ImportError, AttributeError) as error:
            if releases > set(known):
                continue
            raise FastclError(f"{library} cannot be patched: {place} cannot be imported ({error})") from error
        if place in _active:
            found.append(_active[place].target)
            continue
        fit = [target for target in rows if digest(target.sources) in target.digests.values()]
        if not fit and not force:
            raise FastclError(
                f"{library} {_version(library)}: the source of {place} is not that of a release that fastcl was "
                f"compared with ({', '.join(known)}), so its numbers may be others; force=True replaces it anyway"
            )
        found.append((fit or rows)[0])
    return found


def _check_place(library: str, target: Target) -> None:
    owner, name = _owner(target.place)
    function = getattr(owner, name)
    if target.adapter:
        import_module(target.adapter)
    if not inspect.isclass(owner) and not (isinstance(function, FunctionType) and function.__closure__ is None):
        raise FastclError(f"{library} cannot be patched: {target.place} is not a function of its module any more")


def _version(library: str) -> str:
    try:
        return metadata.version(DISTRIBUTIONS[library])
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _line(library: str, targets: list[Target]) -> str:
    names = [target.place.partition(":")[2] for target in targets]
    return f"{library} {_version(library)}: {', '.join(names)}"


def _replace(target: Target, owner: Any, name: str) -> _Active:
    original = getattr(owner, name)
    if inspect.isclass(owner):
        hooks = {hook: getattr(owner, hook) for hook in target.hooks}
        stand_in = _stand_in(target, original, hooks)
        inherited = name not in vars(owner)
        setattr(owner, name, stand_in)

        def put_back() -> None:
            if vars(owner).get(name) is not stand_in:
                warnings.warn(f"{target.place} was replaced again since fastcl.patch and stays as it is", stacklevel=4)
            elif inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

        return _Active(target, put_back, stand_in)
    copy = FunctionType(original.__code__, original.__globals__, name, original.__defaults__, original.__closure__)
    kept, space = original.__code__, {}
    found = inspect.signature(original).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = ", ".join(stars.get(one.kind, "") + one.name for one in found)
    exec(_STUB.format(name=name, parameters=parameters, place=target.place), space)
    stub = original.__code__ = space[name].__code__

    def put_back_code() -> None:
        if original.__code__ is stub:
            original.__code__ = kept
        else:
            warnings.warn(f"{target.place} was replaced again since fastcl.patch and stays as it is", stacklevel=4)

    return _Active(target, put_back_code, _stand_in(target, copy, {}))


# Names that were imported hold the function itself, so that its code is exchanged. It keeps its parameters, which
# torch.compile remembers by function, and its defaults.
_STUB = """
def {name}({parameters}):
    from fastcl.adapters.patching import call
    return call({place!r}, {parameters})
"""


def _stand_in(target: Target, original: Any, hooks: dict[str, Any]) -> Callable[..., Any]:
    ours = target.ours

    @wraps(original)
    def replaced(*args: Any, **options: Any) -> Any:
        found = NotImplemented
        if not hooks or (args and _is_as_it_was(hooks, args[0])):
            try:
                found = ours(*args, **options)
            except (ValueError, ArithmeticError):  # what fastcl refuses the original computes, or refuses itself
                pass
        return original(*args, **options) if found is NotImplemented else found

    return replaced


def _is_as_it_was(hooks: dict[str, Any], loss: Any) -> bool:
    """Whether neither the class of a loss nor the loss itself has other methods in the place of the hooks."""
    return all(hook not in loss.__dict__ and getattr(type(loss), hook) is plain for hook, plain in hooks.items())


def _release(place: str) -> None:
    active = _active[place]
    active.holders -= 1
    if not active.holders:
        del _active[place]
        active.put_back()
