"""The one error that a user's input can cause: one line that says what was got and expected."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user. Commands print it as one line and exit with code 2."""


def summary(error: Exception) -> str:
    """What went wrong elsewhere, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def unknown(kind: str, got: object, known: Iterable[str], where: str = "") -> InputError:
    """The error for a name that is not in a table, with its nearest neighbours first.

    Args:
      kind: what the name stands for, as it should read in the message ("reducer", "model").
      got: the name that was given.
      known: the names that would have been accepted.
      where: what lists them, where they are too many for a line.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    listed = f" {where}" if where else f": {', '.join(names)}"
    return InputError(f"unknown {kind} {got!r}; {hint}expected one of{listed}")
