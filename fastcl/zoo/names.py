"""How a model is named: [timm:|torchvision:]NAME[=FILE]."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from fastcl.errors import FastclError, one_of, shown

Library: TypeAlias = Literal["timm", "torchvision"]


@dataclass(frozen=True)
class ModelName:
    """One model.

    Attributes:
        text: what the user wrote; names the model in results.
        library: where it comes from.
        name: its name there.
        weights: a file of weights, .safetensors or one of torch.save; None: random or pretrained weights.
    """

    text: str
    library: Library
    name: str
    weights: Path | None = None

    @classmethod
    def parsed(cls, text: str) -> ModelName:
        """From [LIBRARY:]NAME[=FILE]. Raises FastclError for an empty or unknown name or library."""
        before, equals, file = text.partition("=")
        prefix, colon, name = before.rpartition(":")
        library = prefix if colon else "timm"
        for known in get_args(Library):
            if library == known:
                break
        else:
            raise FastclError(f"--models: {one_of('the library', get_args(Library), library)} in {shown(text)!r}")
        if not name or (equals and not file):
            raise FastclError(f"--models: {shown(text)!r} is not [timm:|torchvision:]NAME[=FILE]")
        found = cls(text, known, name, Path(file) if equals else None)
        found.check_known()
        return found

    def check_known(self) -> None:
        """Raise FastclError, with the nearest names, unless the library has a model of this name."""
        names = _NAMES[self.library]()
        if self.name.partition(".")[0] not in names:
            near = difflib.get_close_matches(self.name, names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise FastclError(f"--models: {self.library} has no model {self.name!r} (of {len(names):,}){hint}")


def parse_models(text: str) -> list[ModelName]:
    """Two or more models from a list with commas. Raises FastclError for fewer, or if one is named twice."""
    found = [ModelName.parsed(part.strip()) for part in text.split(",")]
    if len(found) < 2:
        raise FastclError(f"--models needs two models or more, separated by commas, got {text!r}")
    texts = [model.text for model in found]
    twice = [each for each in texts if texts.count(each) > 1]
    if twice:
        raise FastclError(f"--models names {twice[0]!r} twice; a second one can have weights of its own: NAME=FILE")
    return found


def _of_timm() -> list[str]:
    import timm

    return timm.list_models()


def _of_torchvision() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


_NAMES: dict[Library, Callable[[], list[str]]] = {"timm": _of_timm, "torchvision": _of_torchvision}
