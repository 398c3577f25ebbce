"""One table of parameter names: ours, timm's (and facebook's), Hugging Face's two; used both ways.

Our names are timm's as a tree (`blocks.3.attn.qkv` is `blocks_3/attn/qkv`). PyTorch stores a linear
map as [out, in] and a convolution as [out, in, height, width]; flax stores [in, out] and [height,
width, in, out]. Hugging Face keeps query, key and value apart; timm stacks them, in this order.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from tdm_jax.errors import InputError

Scheme = Literal["timm", "hf_file", "hf_memory"]
Kind = Literal["array", "norm", "dense", "conv"]


class _Row(NamedTuple):
    kind: Kind
    path: str
    hf_file: tuple[str, ...]
    hf_memory: tuple[str, ...] | None = None  # None: as in the file


# {i} is the block, {p} what stands before every name ("vit.", "deit." or nothing).
_EMBEDDINGS = "{p}embeddings."
_FILE = "{p}encoder.layer.{i}."  # what transformers writes to disk, in every version
_MEMORY = "{p}layers.{i}."  # what a model of transformers 5 or later has as its state dict
_TABLE = (
    _Row("array", "cls_token", (_EMBEDDINGS + "cls_token",)),
    _Row("array", "dist_token", (_EMBEDDINGS + "distillation_token",)),
    _Row("array", "reg_token", (_EMBEDDINGS + "register_tokens",)),
    _Row("array", "pos_embed", (_EMBEDDINGS + "position_embeddings",)),
    _Row("conv", "patch_embed/proj", (_EMBEDDINGS + "patch_embeddings.projection",)),
    _Row("norm", "blocks_{i}/norm1", (_FILE + "layernorm_before",),
         (_MEMORY + "layernorm_before",)),
    _Row(
        "dense",
        "blocks_{i}/attn/qkv",
        tuple(_FILE + f"attention.attention.{part}" for part in ("query", "key", "value")),
        tuple(_MEMORY + f"attention.{part}_proj" for part in "qkv"),
    ),
    _Row("dense", "blocks_{i}/attn/proj", (_FILE + "attention.output.dense",),
         (_MEMORY + "attention.o_proj",)),
    _Row("norm", "blocks_{i}/norm2", (_FILE + "layernorm_after",), (_MEMORY + "layernorm_after",)),
    _Row("dense", "blocks_{i}/mlp/fc1", (_FILE + "intermediate.dense",), (_MEMORY + "mlp.fc1",)),
    _Row("dense", "blocks_{i}/mlp/fc2", (_FILE + "output.dense",), (_MEMORY + "mlp.fc2",)),
    _Row("norm", "norm", ("{p}layernorm",)),
    _Row("dense", "head", ("{head}",)),
    _Row("dense", "head_dist", ("distillation_classifier",)),
)  # fmt: skip
# Flax's name -> PyTorch's, for the parameters of each kind of module; "" is the module itself.
_LEAVES: dict[Kind, dict[str, str]] = {
    "array": {"": ""},
    "norm": {"/scale": ".weight", "/bias": ".bias"},
    "dense": {"/kernel": ".weight", "/bias": ".bias"},
    "conv": {"/kernel": ".weight", "/bias": ".bias"},
}
_ANCHOR = {"timm": "patch_embed.proj.weight", "hf": "embeddings.patch_embeddings.projection.weight"}

REDUCER = "reducer/"  # the weights of a learned reducer; other programs know no such thing

# A classifier computes the same without these.
UNUSED = ("pooler.", "mask_token")
# Parts of related models that this one does not have; without them it would compute something else.
FOREIGN = {
    "pre_logits": "a layer between the final norm and the head (ImageNet-21k models)",
    "fc_norm": "a norm after averaging the patch tokens (global average pooling)",
    "norm_pre": "a norm before the first block (CLIP)",
    **dict.fromkeys(("ls1", "gamma_1", "layer_scale"), "layer scale (DeiT III, CaiT, DINOv2)"),
    "q_norm": "normalised queries and keys",
    **dict.fromkeys(("rel_pos", "relative_position"), "relative positions (BEiT)"),
}


class ParamMapping(NamedTuple):
    """One of our parameters, and the arrays of a foreign file that hold it, in stacking order."""

    path: str
    sources: tuple[str, ...]
    axes: tuple[int, ...] | None  # transposition from PyTorch to flax

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape that each of `sources` has if our parameter has this one."""
        if self.axes is not None:
            shape = tuple(shape[axis] for axis in np.argsort(self.axes))
        return [(shape[0] // len(self.sources), *shape[1:])] * len(self.sources)

    def to_flax(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Joins and transposes the arrays of `sources`."""
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0)
        return array if self.axes is None else array.transpose(self.axes)

    def to_torch(self, array: np.ndarray) -> list[np.ndarray]:
        """The exact inverse: one array for each of `sources`."""
        if self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        parts = [array] if len(self.sources) == 1 else np.split(array, len(self.sources), axis=0)
        return [np.ascontiguousarray(part) for part in parts]


class Naming(NamedTuple):
    """How a file names its parameters.

    Attributes:
      scheme: whose names.
      prefix: what stands before each of them ("vit.", "module.", usually nothing).
      head: Hugging Face's name of the classifier.
    """

    scheme: Scheme
    prefix: str = ""
    head: str = "classifier"

    def depth(self, names: Collection[str]) -> int:
        """The number of blocks that the names speak of."""
        block = {"timm": "blocks.", "hf_file": "encoder.layer.", "hf_memory": "layers."}
        pattern = re.compile(re.escape(self.prefix + block[self.scheme]) + r"(\d+)\.")
        return len({match[1] for match in map(pattern.match, names) if match})

    def mappings(self, depth: int) -> dict[str, ParamMapping]:
        """Every parameter that a model of this depth may have, by its path in our tree."""
        blocks = ((row, range(depth) if "{i}" in row.path else [0]) for row in _TABLE)
        leaves = (leaf for row, numbers in blocks for i in numbers for leaf in self._leaves(row, i))
        return {leaf.path: leaf for leaf in leaves}

    def _leaves(self, row: _Row, i: int) -> list[ParamMapping]:
        if self.scheme == "timm":
            modules = ("{p}" + row.path.replace("blocks_", "blocks.").replace("/", "."),)
        elif self.scheme == "hf_memory" and row.hf_memory is not None:
            modules = row.hf_memory
        else:
            modules = row.hf_file
        modules = [name.format(p=self.prefix, i=i, head=self.head) for name in modules]
        axes = {"dense": (1, 0), "conv": (2, 3, 1, 0)}
        return [
            ParamMapping(
                path=row.path.format(i=i) + leaf,
                sources=tuple(name + torch_leaf for name in modules),
                axes=axes[row.kind] if leaf == "/kernel" else None,
            )
            for leaf, torch_leaf in _LEAVES[row.kind].items()
        ]


def detect(names: Collection[str]) -> Naming:
    """Finds out whose names a checkpoint has.

    Raises:
      InputError: there is no patch embedding by any known name, or more than one.
    """
    families = [
        (family, name.removesuffix(anchor))
        for name in names
        for family, anchor in _ANCHOR.items()
        if name.endswith(anchor)
    ]
    if len(families) != 1:
        raise InputError(
            "not one vision transformer with names of timm, facebook or Hugging Face: expected one "
            f"{' or '.join(_ANCHOR.values())}; got {len(families)} among {len(names)} names"
            f" ({ranges(names, most=6)})"
        )
    family, prefix = families[0]
    if family == "timm":
        return Naming("timm", prefix)
    in_memory = any(name.startswith(f"{prefix}layers.") for name in names)
    distilled = any(name.startswith("cls_classifier.") for name in names)
    return Naming(
        "hf_memory" if in_memory else "hf_file",
        prefix,
        "cls_classifier" if distilled else "classifier",
    )


def to_torch(naming: Naming, params: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Parameters by our paths, under the names and in the layout of a PyTorch program.

    A reducer's own weights have no other name; they keep their path.
    """
    blocks = {path.split("/")[0] for path in params if path.startswith("blocks_")}
    mappings = naming.mappings(len(blocks))
    arrays: dict[str, np.ndarray] = {}
    for path, value in params.items():
        if path.startswith(REDUCER):
            arrays[path] = np.asarray(value)
        elif path in mappings:
            parts = mappings[path].to_torch(np.asarray(value))
            arrays.update(zip(mappings[path].sources, parts, strict=True))
        else:
            raise InputError(f"no parameter of a vision transformer is called {path!r}")
    return arrays


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
