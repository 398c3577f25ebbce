"""What architecture a checkpoint is of, as far as its shapes tell."""

import math
from collections.abc import Mapping
from typing import Any

from tdm_jax.checkpoint.names import Naming
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint
from tdm_jax.errors import InputError


def architecture(
    source: RawCheckpoint, naming: Naming, given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int]]:
    """What the arrays' shapes, and a description beside them, say of a model.

    Args:
      source: the checkpoint.
      naming: how it names its arrays.
      given: settings that the caller has decided.

    Returns:
      Fields of `VisionTransformer`, and rows and columns of the patches that the checkpoint's
      position embedding is for.

    Raises:
      InputError: a shape that decides is missing, or nothing tells the number of heads or the grid.
    """
    depth = naming.depth(source.arrays)
    entries = naming.entries(max(depth, 1))

    def shape(path: str, rank: int) -> tuple[int, ...]:
        name = entries[path].sources[0]
        if name not in source.arrays or source.arrays[name].ndim != rank:
            got = source.arrays[name].shape if name in source.arrays else "nothing"
            raise InputError(
                f"{source.path}: the architecture cannot be told without {name} of {rank} "
                f"dimensions; got {got}"
            )
        return source.arrays[name].shape

    def has(path: str) -> bool:
        return entries[path].sources[0] in source.arrays

    width, in_channels, patch, patch_width = shape("patch_embed/proj/kernel", 4)
    if patch != patch_width:
        raise InputError(f"{source.path}: expected square patches; got {patch} x {patch_width}")
    hidden = shape("blocks_0/mlp/fc1/kernel", 2)[0]
    fields: dict[str, Any] = {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "in_channels": in_channels,
        "mlp_ratio": hidden / width,
        "distilled": has("dist_token"),
        "class_token": has("cls_token"),
        "num_registers": shape("reg_token", 3)[1] if has("reg_token") else 0,
    }
    if has("head/kernel"):
        fields["num_classes"] = shape("head/kernel", 2)[0]
    classes = source.num_classes
    if classes is not None and fields.setdefault("num_classes", classes) != classes:
        raise InputError(
            f"{source.path}: the description says {classes} classes, the head has "
            f"{fields['num_classes']}"
        )
    if source.layer_norm_eps is not None:
        fields["layer_norm_eps"] = source.layer_norm_eps
    if source.num_heads is not None:
        fields["num_heads"] = source.num_heads
    elif width % 64 == 0:
        fields["num_heads"] = width // 64
    elif "num_heads" not in given:
        raise InputError(
            f"{source.path}: the number of heads cannot be told from the width {width}, which is "
            "no multiple of 64; expected num_heads"
        )
    placed = fields["class_token"] + fields["distilled"]
    grid = _grid(source, shape("pos_embed", 3)[1] - placed, patch, given)
    fields["image_size"] = (grid[0] * patch, grid[1] * patch)
    return fields, grid


def _grid(
    source: RawCheckpoint, patches: int, patch: int, given: Mapping[str, Any]
) -> tuple[int, int]:
    if source.image_size is not None:
        grid = (source.image_size[0] // patch, source.image_size[1] // patch)
        if math.prod(grid) != patches:
            raise InputError(
                f"{source.path}: images of {source.image_size} have {math.prod(grid)} patches, the "
                f"position embedding {patches}"
            )
        return grid
    side = math.isqrt(max(patches, 0))
    if side * side == patches > 0:
        return side, side
    if "image_size" in given and not isinstance(given["image_size"], int):
        grid = tuple(pixels // patch for pixels in given["image_size"])
        if math.prod(grid) == patches:
            return grid
    raise InputError(
        f"{source.path}: the position embedding has {patches} patches, which is no square; "
        "expected image_size as (height, width) with as many"
    )
