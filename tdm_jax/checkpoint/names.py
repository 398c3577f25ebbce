"""From a file's names to our parameters and back, by the tables of `name_tables`.

PyTorch stores a linear map as [out, in] and a convolution as [out, in, height, width]; flax stores
[in, out] and [height, width, in, out]. Where one program keeps apart what another stacks (query,
key and value; a gate and what it multiplies; all blocks) a mapping has pieces.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from tdm_jax.checkpoint.foreign import ignored
from tdm_jax.checkpoint.layouts import SAME, Layout, Layouts, Shape, Sizes
from tdm_jax.checkpoint.name_tables import ANCHORS, TABLES, TREE, At, Scheme
from tdm_jax.errors import InputError

Arrays = Mapping[str, np.ndarray]

REDUCER = "reducer/"  # the weights of a learned reducer; other programs know no such thing
_STRIP, _ALIGNED = 64, 64  # channels, bytes
_QKV_BIAS = "blocks_{i}/attn/qkv/bias"
_COLOURS = 3  # of the images whose patches a file has in one flat axis


class Piece(NamedTuple):
    """An array of a foreign file, or a part of it, that holds a parameter of ours or a part of it.

    Attributes:
      source: its name.
      layout: of this part.
      sizes: of the axes that the layout joins.
      rows: (first, end, all): which share of the first axis; None for everything.
      block: (number, depth): which entry of a first axis over the blocks; None without one.
    """

    source: str
    layout: Layout
    sizes: Sizes
    rows: tuple[int, int, int] | None = None
    block: tuple[int, int] | None = None

    def shape(self, shape: Shape) -> Shape:
        """The shape of the whole array if ours is this one."""
        theirs = self.layout.their_shape(shape, self.sizes)
        if self.rows is not None:
            first, end, of = self.rows
            theirs = (theirs[0] * of // (end - first), *theirs[1:])
        return theirs if self.block is None else (self.block[1], *theirs)

    def our_shape(self, shape: Shape) -> Shape | None:
        """Our shape if the whole array has this one; None if it has another rank."""
        if self.block is not None:
            shape = shape[1:]
        if self.rows is not None and shape:
            first, end, of = self.rows
            shape = (shape[0] * (end - first) // of, *shape[1:])
        return self.layout.our_shape(shape, self.sizes)

    def read(self, array: np.ndarray) -> np.ndarray:
        """Our part out of the whole array."""
        if self.block is not None:
            array = array[self.block[0]]
        if self.rows is not None:
            first, end, of = self.rows
            row = array.shape[0] // of
            array = array[first * row : end * row]
        return self.layout.read(array, self.sizes)


class ParamMapping(NamedTuple):
    """One of our parameters, and where a foreign file has it, in stacking order."""

    path: str
    pieces: tuple[Piece, ...]

    @classmethod
    def same(cls, path: str) -> "ParamMapping":
        """Of a parameter that has our name and layout in the file."""
        return cls(path, (Piece(path, SAME, {}),))

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in the file."""
        return tuple(piece.source for piece in self.pieces)

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shape that each of `sources` has if our parameter has this one."""
        if len(self.pieces) > 1:
            shape = (*shape[:-1], shape[-1] // len(self.pieces))
        return [piece.shape(shape) for piece in self.pieces]

    def our_shape(self, arrays: Arrays) -> Shape | None:
        """The shape that our parameter has by the file's; None if that has another rank."""
        shape = self.pieces[0].our_shape(arrays[self.pieces[0].source].shape)
        return shape and (*shape[:-1], shape[-1] * len(self.pieces))

    def read(self, arrays: Arrays) -> np.ndarray:
        """Our parameter in float32, in memory of its own."""
        parts = [piece.read(arrays[piece.source]) for piece in self.pieces]
        *front, last = parts[0].shape
        shape = (*front, last * len(parts))
        # JAX takes over what begins at a multiple of 64 bytes, without a copy.
        memory = np.empty(4 * math.prod(shape) + _ALIGNED, np.uint8)
        start = -memory.ctypes.data % _ALIGNED
        whole = np.ndarray(shape, np.float32, memory, start)
        for place, part in zip(np.split(whole, len(parts), axis=-1), parts, strict=True):
            # A transposed array is copied five times as fast by strips that the cache can hold.
            for first in range(0, last, _STRIP):
                strip = np.s_[..., first : first + _STRIP]
                place[strip] = part[strip]
        return whole

    def write(self, array: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """The exact inverse: what each piece holds."""
        parts = np.split(array, len(self.pieces), axis=-1) if len(self.pieces) > 1 else [array]
        for piece, part in zip(self.pieces, parts, strict=True):
            yield piece, piece.layout.write(part, piece.sizes)


class Naming(NamedTuple):
    """How a file names its parameters.

    Attributes:
      scheme: whose names.
      prefix: what stands before each of them ("vit.", "module.", usually nothing).
      forms: habits of the file, from the scheme's table.
      qkv_bias: which of query, key and value have a bias, where each stands alone.
      chunk: blocks in one of facebook's chunks (`blocks.0.3.`); 0 without chunks.
      sizes: of axes that the file joins or splits: "heads", or "row" and "column" of a patch.
    """

    scheme: Scheme
    prefix: str = ""
    forms: frozenset[str] = frozenset()
    qkv_bias: str = "qkv"
    chunk: int = 0
    sizes: Mapping[str, int] = {}

    def depth(self, arrays: Arrays) -> int:
        """The number of blocks that the file has."""
        begin = self._table()["{b}"].names[0]
        if "{i}" not in begin:
            stacked = (name for name in arrays if name.startswith(begin.format(p=self.prefix)))
            return next((arrays[name].shape[0] for name in stacked if arrays[name].shape), 0)
        chunk = r"\d+\." if self.chunk else ""
        number = re.escape(begin).replace(r"\{i\}", chunk + r"(\d+)")
        block = re.compile(number.replace(r"\{p\}", re.escape(self.prefix)))
        return len({match[1] for match in map(block.match, arrays) if match})

    def mappings(self, depth: int) -> dict[str, ParamMapping]:
        """Every parameter that a model of this depth may have, by its path in our tree."""
        table = self._table()
        begin = table.pop("{b}").names[0]
        stacked = "{i}" not in begin
        found = {}
        for path, at in table.items():
            blocks = "{i}" in path
            for leaf, layout in _layouts(path, at).items():
                # A single parameter that has an entry of its own is not where its module is.
                if leaf and f"{path}/{leaf}" in table:
                    continue
                for i in range(depth if blocks else 1):
                    number = f"{i // self.chunk}.{i}" if self.chunk else i
                    place = {"p": self.prefix, "b": begin.format(p=self.prefix, i=number)}
                    block = (i, depth) if blocks and stacked else None
                    mapping = ParamMapping(
                        (f"{path}/{leaf}" if leaf else path).format(i=i),
                        tuple(
                            Piece(name.format(**place), layout, self.sizes, at.rows, block)
                            for name in self._names(path, at, leaf)
                        ),
                    )
                    found[mapping.path] = mapping
        return found

    def _table(self) -> dict[str, At]:
        table: dict[str, At] = {}
        for form, entries in TABLES[self.scheme].items():
            table |= entries if not form or form in self.forms else {}
        return table

    def _names(self, path: str, at: At, leaf: str) -> list[str]:
        names = list(at.names)
        if len(names) == len("qkv") and _QKV_BIAS in (path, f"{path}/{leaf}"):
            names = [n for n, part in zip(names, "qkv", strict=True) if part in self.qkv_bias]
        if not leaf:
            return names
        if self.scheme == "flax":
            return [f"{name}/{leaf}" for name in names]
        leaf = "bias" if leaf == "bias" else "weight"
        return [name.replace("*", leaf) if "*" in name else f"{name}.{leaf}" for name in names]


def _layouts(path: str, at: At) -> Layouts:
    if at.layouts is not None or path in TREE:
        return at.layouts or TREE[path]
    module, _, leaf = path.rpartition("/")
    return {"": TREE[module][leaf]}


def detect(arrays: Arrays) -> Naming:
    """Finds out whose names a checkpoint has, and in which of their forms.

    Raises:
      InputError: there is no patch embedding by any known name, or more than one.
    """
    anchors = [
        (name, anchor)
        for name in arrays
        for anchor in ANCHORS
        if name.endswith(anchor) and name.removesuffix(anchor)[-1:] in ("", ".", "/")
    ]
    if len(anchors) != 1:
        raise InputError(
            "not one vision transformer with names of timm, facebook, Hugging Face, OpenCLIP or "
            f"big_vision: expected one {' or '.join(ANCHORS)}; got {len(anchors)} among "
            f"{len(arrays)} names ({ranges(arrays, most=6)})"
        )
    ((name, anchor),) = anchors
    scheme, prefix = ANCHORS[anchor], name.removesuffix(anchor)
    names = [name for name in arrays if not ignored(name)]
    forms = {form for form in TABLES[scheme] if form and any(form in name for name in names)}
    sizes: dict[str, int] = {}
    if scheme == "hf_clip" and arrays[name].ndim == 2:
        forms.add("naflex")
        sizes = dict.fromkeys(
            ("row", "column"), max(math.isqrt(arrays[name].shape[1] // _COLOURS), 1)
        )
    if scheme == "flax":
        queries = [arrays[name].shape for name in names if name.endswith("/query/bias")]
        sizes = {"heads": queries[0][-2]} if queries and len(queries[0]) > 1 else {}
    chunks = [re.match(re.escape(prefix) + r"blocks\.(\d+)\.(\d+)\.", name) for name in names]
    first = {match[2] for match in chunks if match and match[1] == "0"}
    naming = Naming(scheme, prefix, frozenset(forms), chunk=len(first), sizes=sizes)
    return naming._replace(qkv_bias=_with_bias(naming, arrays))


def _with_bias(naming: Naming, arrays: Arrays) -> str:
    depth = naming.depth(arrays)
    mappings = naming.mappings(depth)
    biases = [mappings[_QKV_BIAS.format(i=i)].sources for i in range(depth)]
    present = [any(name in arrays for name in names) for names in zip(*biases, strict=True)]
    found = "".join(part for part, there in zip("qkv", present, strict=False) if there)
    if not found or naming.scheme == "hf_dinov3":
        return found
    # EVA's attention has two or none, any other three or none: else the file is incomplete.
    evas = naming.forms & {"q_bias", "attn.q_proj"} and "k" not in found
    return "qv" if evas else "qkv"


def to_torch(naming: Naming, params: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Parameters by our paths, under the names and in the layout of another program.

    They are views of ours, transposed, where nothing is joined. A reducer's own weights have no
    other name; they keep their path.

    Raises:
      InputError: the program has no such parameter.
    """
    depth = len({path.split("/")[0] for path in params if path.startswith("blocks_")})
    mappings = naming.mappings(depth)
    parts: dict[str, list[tuple[int, Piece, np.ndarray]]] = {}
    for path, value in params.items():
        array = np.asarray(value)
        if path.startswith(REDUCER):
            mappings[path] = ParamMapping.same(path)
        if path not in mappings:
            raise InputError(f"no parameter of a vision transformer is called {path!r}")
        for piece, part in mappings[path].write(array):
            place = piece.block or piece.rows or (0,)
            parts.setdefault(piece.source, []).append((place[0], piece, part))
    return {source: _whole(pieces) for source, pieces in parts.items()}


def _whole(pieces: list[tuple[int, Piece, np.ndarray]]) -> np.ndarray:
    arrays = [array for _, _, array in sorted(pieces, key=lambda piece: piece[0])]
    if pieces[0][1].block is not None:
        return np.stack(arrays)
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


_NUMBER = re.compile(r"(?<=[._])\d+(?=[./])")


def ranges(names: Collection[str], most: int = 20) -> str:
    """A short list of names: those that differ in a block's number alone become one."""
    groups: dict[str, list[int]] = {}
    for name in names:
        numbers = groups.setdefault(_NUMBER.sub("#", name, count=1), [])
        numbers.extend(int(number) for number in _NUMBER.findall(name)[:1])
    listed = [key.replace("#", _span(numbers), 1) for key, numbers in groups.items()]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def _span(numbers: list[int]) -> str:
    first, last = (min(numbers), max(numbers)) if numbers else (0, 0)
    if len(numbers) > 2 and sorted(numbers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, sorted(numbers)))
