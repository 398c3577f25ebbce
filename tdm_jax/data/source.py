"""What a source is: random access to encoded images and labels.

A sequence of `{"image": bytes or uint8 array, "label": int}` that knows its classes and can name
the place of each example. All are picklable, so that worker processes may hold one.
"""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

SPLITS = ("train", "validation")
# In the order in which they are looked for where a config names no validation split.
VALIDATION_NAMES = ("validation", "val", "test")


class Record(TypedDict):
    """One example, not yet decoded."""

    image: bytes | np.ndarray
    label: int


@runtime_checkable
class Source(Protocol):
    """Random access to one split.

    Attributes:
      num_classes: labels lie in [0, num_classes).
    """

    num_classes: int

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In the order of the labels, or None where they have no names."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """Reads one example; OSError or `images.CorruptImage` where that is impossible."""

    def describe(self, index: int) -> str:
        """The place of an example, for messages."""
