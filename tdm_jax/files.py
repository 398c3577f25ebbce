"""Where files lie, how one is written (whole, or not at all), and how JSON is read."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from etils import epath

from tdm_jax.errors import InputError, summary


def is_remote(path: str | PathLike[str]) -> bool:
    """Whether a path leads into an object store (gs://bucket/...)."""
    return "://" in fspath(path)


def reach(path: str | PathLike[str]) -> epath.Path:
    """A path on a disk or in an object store; it need not exist.

    Raises:
      InputError: the store cannot be reached.
    """
    place = epath.Path(path)
    if is_remote(place):
        try:
            place.exists()
        except Exception as error:  # each kind of store fails in its own way
            raise InputError(
                f"cannot reach {place}: {summary(error)}; expected `pip install gcsfs` and "
                "credentials"
            ) from error
    return place


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        return parse_json(path, path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable: {error}") from error


def parse_json(place: object, text: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
      InputError: the text, which was found at `place`, is something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object; got {type(value).__name__}")
    return value


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """What the system refuses inside becomes an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; expected a writable folder"
        ) from error


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Gives a name beside `path` to write to, which takes the place of `path` at the end.

    An error on the way leaves what was at `path` before, and nothing else. Folders are made. What
    is for an object store is written on a disk, and copied when it is whole.

    Raises:
      InputError: nothing can be written there.
    """
    if is_remote(path):
        with TemporaryDirectory() as folder:
            yield (beside := Path(folder, os.path.basename(fspath(path))))
            with beside.open("rb") as written, epath.Path(path).open("wb") as store:
                shutil.copyfileobj(written, store)
        return
    path = Path(path)
    # The suffix stays: writers choose the format by it.
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode
    try:
        yield beside
        beside.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        os.replace(beside, path)
    except IsADirectoryError as error:
        raise InputError(f"cannot write {path}: expected a file name; got a folder") from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(
    path: Path, *, overwrite: bool, ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `path` at the end; an error leaves no trace.

    Args:
      path: of the folder.
      overwrite: whether it may replace one that exists.
      ours: whether that is one to be replaced, and nothing a user would miss.

    Raises:
      InputError: there is one that stays, or nothing can be written there.
    """
    if path.exists() and not (overwrite and ours(path)):
        hint = "not an exported model, so it stays" if overwrite else "--overwrite would replace it"
        raise InputError(f"{path} exists ({hint}); expected a new name")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writable(path):
        beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            shutil.rmtree(path)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes a whole text file as UTF-8, or leaves what was there."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
