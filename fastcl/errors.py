"""The one exception family of the package."""

import difflib
from collections.abc import Iterable


class FastclError(ValueError):
    """Bad input, a broken file or a run that cannot go on.

    The message names the argument (or file) at fault and repeats its value, shape or numbers.
    """


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one (after a prefix), or all where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else f"; known: {', '.join(known)}"
