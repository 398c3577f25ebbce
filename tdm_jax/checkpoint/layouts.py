"""How an array lies in a file and how in our tree: named axes, in another order, split or joined.

`Layout("in heads channel", "in (heads channel)")` says that a file keeps the heads apart. "1" is an
axis of one entry that the other side does not have; `SAME` is an array of any rank as it is.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Sizes = Mapping[str, int]  # of axes that a joined one does not tell: "heads", or "row" and "column"


class Layout(NamedTuple):
    """The axes of an array in a file, and of the same array in our tree."""

    theirs: str
    ours: str

    def their_shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """The shape in the file if ours is this one."""
        if self == SAME:
            return shape
        return _joined(self.theirs, _split(self.ours, shape, sizes))

    def our_shape(self, shape: Shape, sizes: Sizes) -> Shape | None:
        """The shape in our tree if the file's is this one; None if it has another rank."""
        if len(shape) != len(_axes(self.theirs)):
            return None
        return _joined(self.ours, _split(self.theirs, shape, sizes))

    def read(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        """From the file to our tree; a view where that is possible."""
        return _rearranged(array, self.theirs, self.ours, sizes)

    def write(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The exact inverse of `read`."""
        return _rearranged(array, self.ours, self.theirs, sizes)


def _axes(pattern: str) -> list[list[str]]:
    groups = re.findall(r"\(([^)]*)\)|(\S+)", pattern)
    return [
        [name for name in (joined or single).split() if name != "1"] for joined, single in groups
    ]


def _split(pattern: str, shape: Shape, sizes: Sizes) -> dict[str, int]:
    found: dict[str, int] = {}
    for group, size in zip(_axes(pattern), shape, strict=True):
        told = {name: sizes[name] for name in group if name in sizes and len(group) > 1}
        found |= told
        # At most one axis of a group is not told.
        found |= {name: size // math.prod(told.values()) for name in group if name not in told}
    return found


def _joined(pattern: str, sizes: Sizes) -> Shape:
    return tuple(math.prod(sizes[name] for name in group) for group in _axes(pattern))


def _rearranged(array: np.ndarray, before: str, after: str, sizes: Sizes) -> np.ndarray:
    if before == after:
        return array
    split = _split(before, array.shape, sizes)
    names = [name for group in _axes(before) for name in group]
    order = [names.index(name) for group in _axes(after) for name in group]
    elementary = array.reshape([split[name] for name in names])
    return elementary.transpose(order).reshape(_joined(after, split))


SAME = Layout("", "")

# Our parameter's last part -> how it lies in a file, for the modules of each kind.
Layouts = Mapping[str, Layout]
_VECTOR = Layout("d", "d")
VECTOR: Layouts = {"": _VECTOR}
TOKENS: Layouts = {"": Layout("b n d", "b n d")}
NORM: Layouts = {"scale": _VECTOR, "bias": _VECTOR}
MATRIX: Layouts = {"": Layout("in out", "in out")}  # of a flax program, or used from the right
# PyTorch's.
DENSE: Layouts = {"kernel": Layout("out in", "in out"), "bias": _VECTOR}
CONV: Layouts = {"kernel": Layout("out in row column", "row column in out"), "bias": _VECTOR}
PATCHES: Layouts = {"kernel": Layout("out (row column in)", "row column in out"), "bias": _VECTOR}
TOKEN: Layouts = {"": Layout("d", "1 1 d")}
TABLE: Layouts = {"": Layout("n d", "1 n d")}
# Flax's.
FLAX_DENSE: Layouts = {"kernel": MATRIX[""], "bias": _VECTOR}
_HWIO = "row column in out"
FLAX_CONV: Layouts = {"kernel": Layout(_HWIO, _HWIO), "bias": _VECTOR}
TO_HEADS: Layouts = {
    "kernel": Layout("in heads channel", "in (heads channel)"),
    "bias": Layout("heads channel", "(heads channel)"),
}
FROM_HEADS: Layouts = {
    "kernel": Layout("heads channel out", "(heads channel) out"),
    "bias": _VECTOR,
}
