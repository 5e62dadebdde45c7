"""The package's exception, and helpers for its messages."""

import difflib
from collections.abc import Iterable, Mapping


class FastclError(ValueError):
    """Invalid input, a damaged file or a run that cannot continue.

    The message names the argument (or file) at fault and repeats its value, shape or numbers. Characters that cannot be
    displayed (bytes of a file name that are not UTF-8, control characters) are escaped.
    """

    def __str__(self) -> str:  # not when it is made: torch.compile could not follow
        return "\n".join(shown(line) for line in super().__str__().split("\n"))


class ToldHere(FastclError):
    """An error that several processes raise and this one reports."""


class ToldElsewhere(FastclError):
    """An error that several processes raise and another one of them reports."""


def shown(name: object) -> str:
    """A name on one line, with everything unprintable escaped: line breaks, control characters, and the bytes that
    Python stores as surrogates if a file name is not UTF-8 (b"caf\\xe9" is shown as caf\\xe9)."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def suggest(word: str, known: Iterable[str], prefix: str = "", synonyms: Mapping[str, str] | None = None) -> str:
    """End of a message about an unknown name: suggests the nearest known one (with the prefix) or lists all of them.

    Args:
        synonyms: other names, in lower case and without "-", "_" and spaces, -> the known name that each stands for.
    """
    known = sorted(known)
    plain = _plain(word)
    meant = (synonyms or {}).get(plain)
    near = [name for name in known if name == meant or _plain(name) == plain]
    near = near or _close(word, tuple(known))
    return f"; did you mean '{prefix}{near[0]}'?" if near else f"; expected one of: {', '.join(known)}"


def _close(word: str, known: tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.5)


_close._dynamo_marked_constant = True  # torch.compile, which cannot follow it, calls it  # pyright: ignore


def _plain(word: str) -> str:
    return "".join(c for c in word.lower() if c not in "-_ ")


def one_of(name: str, choices: Iterable[str | None], value: object) -> str:
    """Message about a value that is none of the choices; the last choice may be None."""
    *most, last = map(repr, choices)
    return f"{name} must be {', '.join(most)} or {last}, got {brief(value)}"


def brief(value: object, letters: int = 200) -> str:
    """A value as shown in messages: its repr, truncated if it is long, or its type if the repr fails."""
    if type(value) is float:
        return f"{float(value)}"  # which torch.compile can write where it is a symbol
    try:
        text = f"{value!r}"
    except (ValueError, RecursionError):  # an integer with more digits than Python converts; deep nesting
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= letters else f"{text[:letters]}…"


def type_of(x: object) -> str:
    """The name of a type for messages that ask for a tensor; of a NumPy array with what makes it one."""
    hint = "; convert it with torch.from_numpy" if type(x).__module__ == "numpy" and hasattr(x, "shape") else ""
    return f"{type(x).__name__}{hint}"


def install_hint(extra: str) -> str:
    """How to install an optional extra. fastcl is on no package index: it comes from a checkout or as a wheel."""
    return f"in a checkout: pip install '.[{extra}]'; from a wheel: pip install 'FILE.whl[{extra}]'"
