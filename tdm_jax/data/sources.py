"""Where examples come from: the source that a data config names, without TensorFlow."""

import functools

import numpy as np

from tdm_jax.data.cluttered_digits import ClutteredDigits
from tdm_jax.data.config import EMBEDDED, DataConfig
from tdm_jax.data.folder_source import open_folder, open_photos
from tdm_jax.data.source import SPLITS, Record, Source
from tdm_jax.errors import InputError, unknown
from tdm_jax.files import reach


def open_source(config: DataConfig, split: str) -> Source:
    """Opens config's "train" or "validation" split.

    Raises:
      InputError: an unknown split; a missing or empty directory; a data set that is not prepared.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if config.name not in EMBEDDED and not config.data_dir:
        raise InputError(f"data.data_dir is empty; data.name={config.name!r} needs a directory")
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
    if name == "cluttered_digits":
        # Ten draws and more of each digit: chance moves an accuracy by a point at most.
        length = {"train": 40_000, "validation": 4_000}[role]
        return ClutteredDigits(DigitsSource(role), length, seed=SPLITS.index(role))
    if name == "folder":
        return open_folder(reach(data_dir).expanduser(), role, train, validation, holdout)
    if name == "photos":
        return open_photos(reach(data_dir).expanduser(), role)
    # Imported here: importing TFDS takes a second that the other sources need not wait for.
    from tdm_jax.data import tfds_source

    split = train if role == "train" else validation
    return tfds_source.open_tfds(name.removeprefix("tfds:"), data_dir, split)


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
