"""Image files: in class folders, in any folder, in a list; on a disk or in an object store."""

import hashlib
import os

import numpy as np
from etils import epath

from tdm_jax.data.images import IMAGE_SUFFIXES
from tdm_jax.data.source import VALIDATION_NAMES, Record
from tdm_jax.errors import InputError
from tdm_jax.files import is_remote


class FolderSource:
    """Image files and their labels."""

    def __init__(
        self, root: epath.Path, files: list[str], labels: np.ndarray, class_names: tuple[str, ...]
    ):
        """Takes files relative to `root`, one label each."""
        self._root, self._files, self._labels = os.fspath(root), files, labels
        self.class_names, self.num_classes = class_names, len(class_names)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        image = epath.Path(self.describe(index)).read_bytes()
        return {"image": image, "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        """Its path."""
        name = self._files[index]
        return name if is_remote(name) else os.path.join(self._root, name)


def open_folder(
    root: epath.Path, role: str, train: str, validation: str, holdout: float
) -> FolderSource:
    """A directory of train/<class>/… and validation/ or val/, or of the class folders themselves.

    Classes are folder names in sorted order; the validation folder takes its labels from the
    training folder's names. Without split folders, the share `holdout` of each class (at least one
    image, chosen by a hash of the file's name, so always the same) is the validation split.

    Args:
      root: the directory.
      role: "train" or "validation".
      train: folder name.
      validation: folder name; if empty, the first that exists of `VALIDATION_NAMES`.
      holdout: share in (0, 1).

    Raises:
      InputError: the directory, a split or its images are missing, or classes do not match.
    """
    folders = _folders(root)
    candidates = [validation] if validation else list(VALIDATION_NAMES)
    held_out = next((name for name in candidates if name in folders), None)
    if train not in folders and held_out is None:
        return _open_bare(root, folders, role, holdout)
    split = train if role == "train" else held_out
    if split not in folders:
        expected = train if role == "train" else " or ".join(candidates)
        raise InputError(f"no folder {expected} in {root}; it has {_some(folders)}")
    classes = _classes(root / (train if train in folders else split))
    extra = set(_classes(root / split)) - set(classes)
    if extra:
        raise InputError(
            f"classes in {root / split} that {root / train} lacks: {_some(sorted(extra))}"
        )
    files = {name: _images(root, f"{split}/{name}") for name in classes}
    empty = [name for name, paths in files.items() if not paths]
    if role == "train" and empty:
        raise InputError(f"no images in these class folders of {root / split}: {_some(empty)}")
    return _folder_source(root, files)


def open_photos(root: epath.Path, role: str) -> FolderSource:
    """All images below a directory, at any depth, or those of a list, each with the label 0.

    Args:
      root: the directory, or a text file with a path on each line: absolute, relative to the
        file's folder, or in an object store.
      role: "validation".

    Raises:
      InputError: there is no image, or somebody wants to train on them.
    """
    if role == "train":
        raise InputError("photos have no classes to train on; expected data.name='folder'")
    listed = root.is_file()
    files = _lines(root) if listed else _images(root, "")
    if not files:
        raise InputError(f"no images {'in the list' if listed else 'under'} {root}")
    return FolderSource(root.parent if listed else root, files, np.zeros(len(files), int), ())


def _open_bare(root: epath.Path, folders: list[str], role: str, holdout: float) -> FolderSource:
    files = {name: _images(root, name) for name in folders}
    few = [name for name, paths in files.items() if len(paths) < 2]
    if not files or few:
        got = f"too few images in {_some(few)}" if few else "no folders at all"
        raise InputError(
            f"{root}: {got}; expected train and val folders of class folders, or class folders of "
            "two images or more"
        )

    def part(paths: list[str]) -> list[str]:
        held = min(len(paths) - 1, max(1, round(holdout * len(paths))))
        order = sorted(paths, key=lambda name: hashlib.blake2b(name.encode()).digest())
        return sorted(order[held:] if role == "train" else order[:held])

    return _folder_source(root, {name: part(paths) for name, paths in files.items()})


def _folder_source(root: epath.Path, files: dict[str, list[str]]) -> FolderSource:
    flat = [path for paths in files.values() for path in paths]
    if not flat:
        raise InputError(f"no images under {root}")
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return FolderSource(root, flat, labels, tuple(files))


def _folders(path: epath.Path) -> list[str]:
    try:
        return sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the data directory {path}: {error.strerror}") from None


def _classes(path: epath.Path) -> tuple[str, ...]:
    names = tuple(_folders(path))
    if not names:
        raise InputError(f"no class folders in {path}; expected one folder a class, of images")
    return names


def _images(root: epath.Path, folder: str) -> list[str]:
    """Image files under a folder, at any depth, relative to root and sorted."""
    top = root / folder
    # A disk is walked by `os`, which can follow links.
    walk = top.walk() if is_remote(top) else os.walk(top, followlinks=True)
    found, start = [], None
    for directory, _, names in walk:
        start = start or os.fspath(directory)  # stores spell the folder in their own way
        relative = os.path.join(folder, os.path.relpath(directory, start))
        found += [
            os.path.normpath(os.path.join(relative, name))
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _lines(path: epath.Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not readable: {error}; expected a folder, or a text file with the path of an "
            "image on each line"
        ) from error
    return [name for line in lines if (name := line.strip())]


def _some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "no folders") + more
