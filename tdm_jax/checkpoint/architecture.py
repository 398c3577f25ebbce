"""What architecture a checkpoint is of: by its arrays' shapes, its description and its family."""

import math
from collections.abc import Mapping
from typing import Any

from tdm_jax.checkpoint.families import defaults
from tdm_jax.checkpoint.names import Naming, ParamMapping
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint
from tdm_jax.errors import InputError

_GRID = 16  # patches a side where nothing tells: 256 pixels in patches of 16


class _Shapes:
    """The shapes of our parameters, as the file's arrays tell them."""

    def __init__(self, checkpoint: RawCheckpoint, mappings: Mapping[str, ParamMapping]):
        self._path, self._arrays, self._mappings = checkpoint.path, checkpoint.arrays, mappings

    def has(self, path: str) -> bool:
        mapping = self._mappings.get(path)
        return mapping is not None and all(n in self._arrays for n in mapping.sources[:1])

    def __call__(self, path: str, rank: int) -> tuple[int, ...]:
        shape = self._mappings[path].our_shape(self._arrays) if self.has(path) else None
        if shape is None or len(shape) != rank or (0 in shape and path != "reg_token"):
            name = self._mappings[path].sources[0]
            got = self._arrays[name].shape if name in self._arrays else "nothing"
            raise InputError(
                f"{self._path}: the architecture cannot be told without {name} of {rank} "
                f"dimensions; got {got}"
            )
        return shape


def architecture(
    checkpoint: RawCheckpoint, naming: Naming, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int]]:
    """What the arrays' shapes, a description beside them, and the family say of a model.

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
    shape = _Shapes(checkpoint, naming.mappings(max(depth, 1)))
    headless = settings.get("num_classes") == 0
    fields = _told(checkpoint, naming, shape, headless) | {"depth": depth}
    grid, fields["positions"] = _grid(checkpoint, naming, shape, fields, settings)
    patch = fields["patch_size"]
    fields["image_size"] = (grid[0] * patch, grid[1] * patch)
    if naming.scheme != "hf_clip" or "classifier" in naming.forms:
        _check_classes(checkpoint, fields)  # a projection has no labels
    shared = ("image_size", "num_classes", "reducer")
    own = {name: value for name, value in description.items() if name not in shared}
    fields |= defaults(naming, arrays, fields) | own
    if fields["pool"] == ("token" if fields["class_token"] else "avg"):
        fields["pool"] = None  # as a model says it that was made by name
    if {**fields, **settings}["num_heads"] is None:
        raise InputError(
            f"{checkpoint.path}: the number of heads cannot be told from the width "
            f"{fields['width']}, which is no multiple of 64; expected num_heads"
        )
    return fields, grid


def _told(
    checkpoint: RawCheckpoint, naming: Naming, shape: _Shapes, headless: bool
) -> dict[str, Any]:
    patch, patch_width, in_channels, width = shape("patch_embed/proj/kernel", 4)
    if patch != patch_width:
        raise InputError(f"{checkpoint.path}: expected square patches; got {patch} x {patch_width}")
    hidden = shape("blocks_0/mlp/fc2/kernel", 2)[0]
    has, pool = shape.has, None
    headed = (has("head/kernel") or has("head/bias")) and not headless
    head = shape("head/kernel", 2) if headed else (width, 0)
    projects = naming.scheme in ("openclip", "hf_clip") and "classifier" not in naming.forms
    if head[1] and "classifier" in naming.forms and has("norm_pre/scale"):
        raise InputError(
            f"{checkpoint.path}: not supported: CLIP's classifier reads tokens before the final "
            "norm; num_classes=0 leaves it out"
        )
    if head[0] == 2 * width:
        pool = "token_avg"
    elif has("fc_norm/scale") or (head[1] and "classifier" in naming.forms):
        pool = "avg"  # SigLIP's classifier does not read the pooling head
    elif has("attn_pool/latent") or has("attn_pool/q/kernel"):
        pool = "map"
    return {
        "patch_size": patch,
        "width": width,
        "in_channels": in_channels,
        "mlp_ratio": hidden / width,
        "gated_mlp": shape("blocks_0/mlp/fc1/kernel", 2)[1] == 2 * hidden,
        "mlp_norm": has("blocks_0/mlp/norm/scale"),
        "layer_scale": has("blocks_0/ls1/gamma"),
        "qkv_bias": naming.qkv_bias,
        # CLIP alone has none: elsewhere the file is incomplete.
        "patch_bias": has("patch_embed/proj/bias") or not has("norm_pre/scale"),
        "pre_norm": has("norm_pre/scale"),
        "fc_norm": has("fc_norm/scale"),
        "distilled": has("dist_token"),
        "class_token": has("cls_token"),
        "num_registers": shape("reg_token", 3)[1] if has("reg_token") else 0,
        "num_classes": head[1],
        "head_bias": has("head/bias") or not (headed and projects),
        "pool": pool,
    }


def _check_classes(checkpoint: RawCheckpoint, fields: Mapping[str, Any]) -> None:
    classes, found = checkpoint.description.get("num_classes"), fields["num_classes"]
    if classes is not None and found and found != classes:
        raise InputError(
            f"{checkpoint.path}: the description says {classes} classes, the head has {found}"
        )


def _grid(
    checkpoint: RawCheckpoint,
    naming: Naming,
    shape: _Shapes,
    fields: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[tuple[int, int], str]:
    """The grid that the positions are for, and which tokens have one."""
    patch, description = fields["patch_size"], checkpoint.description
    size = description.get("image_size")
    told = None if size is None else (size[0] // patch, size[1] // patch)
    rotary = naming.scheme == "hf_dinov3" or "gamma_1" in naming.forms
    if not shape.has("pos_embed") and description.get("positions", rotary and "none") == "none":
        return told or (_GRID, _GRID), "none"
    rows = shape("pos_embed", 3)[1]
    placed = fields["class_token"] + fields["distilled"]
    # The class token has a position or not: DeiT III's and timm's DINOv2 with registers have none.
    counts = {rows - placed: "all", **({rows: "patches"} if placed else {})}
    if told is not None:
        if math.prod(told) in counts:
            return told, counts[math.prod(told)]
        raise InputError(
            f"{checkpoint.path}: images of {size} have {math.prod(told)} patches, the "
            f"position embedding {rows - placed}"
        )
    wanted = settings.get("image_size", 0)
    asked = (0, 0) if isinstance(wanted, int) else (wanted[0] // patch, wanted[1] // patch)
    # A class token with a position is the rule: the exception comes after what the caller says.
    for grid in (_square(rows - placed), asked, _square(rows)):
        if 0 < math.prod(grid) in counts:
            return grid, counts[math.prod(grid)]
    raise InputError(
        f"{checkpoint.path}: the position embedding has {rows - placed} patches, which is no "
        "square; expected image_size as (height, width) with as many"
    )


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(max(count, 0))
    return (side, side) if side * side == count else (0, 0)
