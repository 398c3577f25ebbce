"""Where examples come from: random access to encoded images and labels, without TensorFlow.

A source is a sequence of `{"image": bytes or uint8 array, "label": int}` that knows its classes and
can name the place of each example. All are picklable, so that worker processes may hold one.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from tdm_jax.data.config import DataConfig
from tdm_jax.errors import InputError, unknown

SPLITS = ("train", "validation")
# In the order in which they are looked for where a config names no validation split.
VALIDATION_NAMES = ("validation", "val", "test")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)


class Record(TypedDict):
    """One example, not yet decoded."""

    image: bytes | np.ndarray
    label: int


@runtime_checkable
class Source(Protocol):
    """Random access to one split.

    Attributes:
      num_classes: labels lie in [0, num_classes).
      class_names: in the order of the labels, or None where they have no names.
    """

    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """Reads one example; OSError or `images.CorruptImage` where that is impossible."""

    def describe(self, index: int) -> str:
        """The place of an example, for messages."""


def open_source(config: DataConfig, split: str) -> Source:
    """Opens config's "train" or "validation" split.

    Raises:
      InputError: an unknown split; a missing or empty directory; a data set that is not prepared.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return _open(
        config.name,
        config.data_dir,
        split,
        config.train_split,
        config.validation_split,
        config.holdout,
    )


# Scanning a million files, or as many records, once a process is enough.
@functools.lru_cache(maxsize=8)
def _open(
    name: str, data_dir: str, role: str, train: str, validation: str, holdout: float
) -> Source:
    if name == "digits":
        return DigitsSource(role)
    if name == "folder":
        return open_folder(Path(data_dir).expanduser(), role, train, validation, holdout)
    # Imported here: importing TFDS takes a second that the other sources need not wait for.
    from tdm_jax.data import tfds_source

    wanted = train if role == "train" else validation
    return tfds_source.open_tfds(name.removeprefix("tfds:"), data_dir, wanted)


class DigitsSource:
    """The 1,797 handwritten digits inside scikit-learn, 8 × 8, grey: 1,437 to train, 360 to test.

    The split is stratified and always the same.
    """

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, split: str):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
        )
        self._rows = np.sort(parts[SPLITS.index(split)])
        # Sixteen grey levels, 0 to 16.
        images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self._images, self._labels = images[self._rows], labels[self._rows]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        """Its row in scikit-learn's table."""
        return f"digits[{self._rows[index]}]"


class FolderSource:
    """Image files and their labels."""

    def __init__(
        self, root: Path, files: list[str], labels: np.ndarray, class_names: tuple[str, ...]
    ):
        """Takes files relative to `root`, one label each."""
        self._root, self._files, self._labels = os.fspath(root), files, labels
        self.class_names, self.num_classes = class_names, len(class_names)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        with open(self.describe(index), "rb") as file:
            return {"image": file.read(), "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        """Its path."""
        return os.path.join(self._root, self._files[index])


def open_folder(root: Path, role: str, train: str, validation: str, holdout: float) -> FolderSource:
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
    named = [name for name in (validation,) if name] or list(VALIDATION_NAMES)
    found = next((name for name in named if name in folders), None)
    if train not in folders and found is None:
        return _open_bare(root, folders, role, holdout)
    split = train if role == "train" else found
    if split not in folders:
        expected = train if role == "train" else " or ".join(named)
        raise InputError(f"no folder {expected} in {root}; it has {_some(folders)}")
    classes = _classes(root / (train if train in folders else split))
    extra = set(_classes(root / split)) - set(classes)
    if extra:
        raise InputError(
            f"classes in {root / split} that {root / train} lacks: {_some(sorted(extra))}"
        )
    files = {name: _images(root, f"{split}/{name}") for name in classes}
    empty = [name for name, found in files.items() if not found]
    if role == "train" and empty:
        raise InputError(f"no images in these class folders of {root / split}: {_some(empty)}")
    return _folder_source(root, files)


def _open_bare(root: Path, folders: list[str], role: str, holdout: float) -> FolderSource:
    files = {name: _images(root, name) for name in folders}
    few = [name for name, found in files.items() if len(found) < 2]
    if not files or few:
        wanted = "train and val folders of class folders, or class folders of two images or more"
        got = f"too few images in {_some(few)}" if few else "no folders at all"
        raise InputError(f"{root}: {got}; expected {wanted}")

    def part(found: list[str]) -> list[str]:
        held = min(len(found) - 1, max(1, round(holdout * len(found))))
        order = sorted(found, key=lambda name: hashlib.blake2b(name.encode()).digest())
        return sorted(order[held:] if role == "train" else order[:held])

    return _folder_source(root, {name: part(found) for name, found in files.items()})


def _folder_source(root: Path, files: dict[str, list[str]]) -> FolderSource:
    names = tuple(files)
    flat = [file for found in files.values() for file in found]
    if not flat:
        raise InputError(f"no images under {root}")
    counts = [len(found) for found in files.values()]
    return FolderSource(root, flat, np.repeat(np.arange(len(names)), counts), names)


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the data directory {path}: {error.strerror}") from None


def _classes(path: Path) -> tuple[str, ...]:
    names = tuple(_folders(path))
    if not names:
        raise InputError(f"no class folders in {path}; expected one folder a class, of images")
    return names


def _images(root: Path, folder: str) -> list[str]:
    """Image files under a class folder, at any depth, relative to root and sorted."""
    found = []
    for directory, folders, files in os.walk(root / folder, followlinks=True):
        folders.sort()
        relative = os.path.relpath(directory, root)
        found += [
            os.path.join(relative, name)
            for name in files
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "no folders") + more
