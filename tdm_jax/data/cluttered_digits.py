"""Cluttered digits: a digit somewhere among fragments of others, so that it matters what is where.

After the cluttered translated MNIST of Mnih et al., "Recurrent Models of Visual Attention" (NeurIPS
2014, arXiv 1406.6247), but small enough that two CPU cores learn it in minutes: scikit-learn's
digits instead of MNIST's, 12 of 32 pixels wide, at places that are multiples of 4 pixels, so that
patches of that size cut a digit the same way wherever it is.
"""

import numpy as np
from PIL import Image

from tdm_jax.data.source import Record, Source

SIDE, DIGIT, STEP, FRAGMENT = 32, 12, 4, 6  # pixels
MAX_FRAGMENTS = 8


class ClutteredDigits:
    """Images that are drawn when they are read; their index alone decides how.

    Each shows the next of the digits in turn, over none to eight fragments: squares cut from any of
    the digits, anywhere. Six sevenths of an image are not its digit.
    """

    def __init__(self, digits: Source, length: int, seed: int):
        """Takes digits and fragments from a source of small grey images."""
        self.num_classes, self.class_names = digits.num_classes, digits.class_names
        records = [digits[i] for i in range(len(digits))]
        self._labels = [record["label"] for record in records]
        self._names = [digits.describe(i) for i in range(len(digits))]
        small = [Image.fromarray(np.asarray(record["image"])[..., 0]) for record in records]
        size = (DIGIT, DIGIT)
        large = (image.resize(size, Image.Resampling.BILINEAR) for image in small)
        self._digits = np.stack([np.asarray(image)[..., None] for image in large])
        self._length, self._seed = length, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        rng = np.random.default_rng((self._seed, index))
        image = np.zeros((SIDE, SIDE, 1), np.uint8)
        y, x = STEP * rng.integers((SIDE - DIGIT) // STEP + 1, size=2)
        for _ in range(rng.integers(MAX_FRAGMENTS + 1)):
            cut = _square(self._digits[rng.integers(len(self._digits))], rng)
            place = _square(image, rng)
            np.maximum(place, cut, out=place)
        which = index % len(self._digits)
        image[y : y + DIGIT, x : x + DIGIT] = self._digits[which]
        return {"image": image, "label": self._labels[which]}

    def describe(self, index: int) -> str:
        """Its number, and which digit it shows."""
        return f"cluttered_digits[{index}], of {self._names[index % len(self._names)]}"


def _square(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A view of a fragment's size, anywhere in the image."""
    y, x = rng.integers(len(image) - FRAGMENT + 1, size=2)
    return image[y : y + FRAGMENT, x : x + FRAGMENT]
