"""What architecture a checkpoint is of, as far as its shapes tell."""

import math
from collections.abc import Mapping
from typing import Any

from tdm_jax.checkpoint.names import Naming
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint
from tdm_jax.errors import InputError


def architecture(
    checkpoint: RawCheckpoint, naming: Naming, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int]]:
    """What the arrays' shapes, and a description beside them, say of a model.

    Args:
      checkpoint: with its description.
      naming: how it names its arrays.
      settings: fields that the caller has decided.

    Returns:
      Fields of `VisionTransformer`, and rows and columns of the patches that the checkpoint's
      position embedding is for.

    Raises:
      InputError: a shape that decides is missing, or nothing tells the number of heads or the grid.
    """
    arrays, description = checkpoint.arrays, checkpoint.description
    depth = naming.depth(arrays)
    mappings = naming.mappings(max(depth, 1))

    def shape(path: str, rank: int) -> tuple[int, ...]:
        name = mappings[path].sources[0]
        if name not in arrays or arrays[name].ndim != rank:
            got = arrays[name].shape if name in arrays else "nothing"
            raise InputError(
                f"{checkpoint.path}: the architecture cannot be told without {name} of {rank} "
                f"dimensions; got {got}"
            )
        return arrays[name].shape

    def has(path: str) -> bool:
        return mappings[path].sources[0] in arrays

    width, in_channels, patch, patch_width = shape("patch_embed/proj/kernel", 4)
    if patch != patch_width:
        raise InputError(f"{checkpoint.path}: expected square patches; got {patch} x {patch_width}")
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
    classes = description.get("num_classes")
    if classes is not None and fields.setdefault("num_classes", classes) != classes:
        raise InputError(
            f"{checkpoint.path}: the description says {classes} classes, the head has "
            f"{fields['num_classes']}"
        )
    fields |= {
        name: description[name] for name in ("layer_norm_eps", "num_heads") if name in description
    }
    if width % 64 == 0:
        fields.setdefault("num_heads", width // 64)
    elif "num_heads" not in {**fields, **settings}:
        raise InputError(
            f"{checkpoint.path}: the number of heads cannot be told from the width {width}, which "
            "is no multiple of 64; expected num_heads"
        )
    placed = fields["class_token"] + fields["distilled"]
    grid = _grid(checkpoint, shape("pos_embed", 3)[1] - placed, patch, settings)
    fields["image_size"] = (grid[0] * patch, grid[1] * patch)
    return fields, grid


def _grid(
    checkpoint: RawCheckpoint, patches: int, patch: int, settings: Mapping[str, Any]
) -> tuple[int, int]:
    if "image_size" in checkpoint.description:
        size = checkpoint.description["image_size"]
        grid = (size[0] // patch, size[1] // patch)
        if math.prod(grid) != patches:
            raise InputError(
                f"{checkpoint.path}: images of {size} have {math.prod(grid)} patches, the "
                f"position embedding {patches}"
            )
        return grid
    side = math.isqrt(max(patches, 0))
    if side * side == patches > 0:
        return side, side
    if not isinstance(settings.get("image_size", 0), int):
        grid = tuple(pixels // patch for pixels in settings["image_size"])
        if math.prod(grid) == patches:
            return grid
    raise InputError(
        f"{checkpoint.path}: the position embedding has {patches} patches, which is no square; "
        "expected image_size as (height, width) with as many"
    )
