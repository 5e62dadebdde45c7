"""The one exception family of the package."""


class FastclError(ValueError):
    """Bad input, a broken file or a run that cannot go on.

    The message names the argument (or file) at fault and repeats its value, shape or numbers.
    """
