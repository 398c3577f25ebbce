"""How a file is written: whole, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdm_jax.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to, which takes the place of `path` at the end.

    An error on the way leaves what was at `path` before, and nothing else. Folders are made.

    Raises:
      InputError: nothing can be written there.
    """
    path = Path(path)
    # The suffix stays: writers choose the format by it.
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch(exist_ok=False)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; expected a writable folder"
        ) from error
    try:
        yield beside
        os.replace(beside, path)
    except IsADirectoryError as error:
        raise InputError(f"cannot write {path}: expected a file name; got a folder") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole text file as UTF-8, or leaves what was there."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
