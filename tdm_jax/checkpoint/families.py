"""What a family's program does where its file is silent: epsilon, activation, pooling, resampling.

A description beside the file, and the caller, know better. A published relative says most of it
(timm's, see `published`); the rest is how transformers 5, facebook's DINOv2 and timm's reader of
.npz differ from that.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tdm_jax.checkpoint.names import Naming
from tdm_jax.models.registry import MODELS, deit_preprocessing

# Fields of `VisionTransformer` that no array tells, and what they are where a name says nothing.
_SILENT: dict[str, Any] = {
    "layer_norm_eps": 1e-6,
    "activation": "gelu",
    "pool": None,
    "interpolation": "bicubic_antialias",
    "rotary": None,
}


def published(name: str) -> dict[str, Any]:
    """What a published model's name says that its arrays do not."""
    preset = MODELS[name]
    return {field: preset.get(field, value) for field, value in _SILENT.items()}


def defaults(naming: Naming, names: Collection[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `VisionTransformer` that no array tells.

    Args:
      naming: whose names, in which forms.
      names: of all arrays.
      fields: what the arrays' shapes have told, the size of the images among it.
    """
    relative = _relative(naming, fields)
    known = published(relative) | _differences(naming, names, fields)
    kin = _kin(fields, known)
    width = fields["width"]
    heads = naming.sizes.get("heads") or _agreed(preset["num_heads"] for preset in kin)
    known["num_heads"] = heads or (None if width % 64 else width // 64)
    if naming.scheme == "timm":
        of_patch = [preset for preset in kin if preset["patch_size"] == fields["patch_size"]]
        activation = _agreed(preset.get("activation", "gelu") for preset in of_patch)
        known["activation"] = activation or known["activation"]
    if fields["in_channels"] == len(MODELS[relative]["preprocessing"].mean):
        known["preprocessing"] = MODELS[relative]["preprocessing"]
        if relative.startswith("deit_"):
            known["preprocessing"] = deit_preprocessing(min(fields["image_size"]))
    return known


def _relative(naming: Naming, fields: Mapping[str, Any]) -> str:
    if fields["positions"] == "none":
        return "vit_small_patch16_dinov3"
    if fields["gated_mlp"] and naming.forms & {"q_bias", "attn.q_proj"}:
        return "eva02_tiny_patch14_224"
    if fields["pre_norm"]:
        return "vit_base_patch16_clip_224"
    if fields["pool"] == "map":
        return "vit_base_patch16_siglip_224"
    return "vit_base_patch16_224" if naming.scheme == "flax" else "deit_base_patch16_224"


def _differences(
    naming: Naming, names: Collection[str], fields: Mapping[str, Any]
) -> dict[str, Any]:
    known: dict[str, Any] = {}
    registers = fields["num_registers"]
    if naming.scheme == "timm" and fields["layer_scale"] and f"{naming.prefix}mask_token" in names:
        # Facebook's own file of DINOv2.
        known["interpolation"] = "bicubic_antialias" if registers else "bicubic_offset"
    elif naming.scheme == "hf":
        known["interpolation"] = "bicubic_antialias" if registers else "bicubic"
        known["layer_norm_eps"] = 1e-6 if fields["layer_scale"] else 1e-12
    elif naming.scheme == "hf_dinov3":
        known["pool"] = "token"
    elif naming.scheme == "hf_clip":
        known["interpolation"] = "bilinear_antialias" if "naflex" in naming.forms else "bicubic"
        known["activation"] = "quick_gelu" if fields["pre_norm"] else "gelu_tanh"
    elif naming.scheme == "flax":
        known["interpolation"] = "bilinear"
        if "encoderblock/" in naming.forms:
            known["activation"] = "gelu_tanh"
    if fields["gated_mlp"]:
        known["activation"] = "silu"
    if fields["pool"] is not None:
        known["pool"] = fields["pool"]
    return known


def _kin(fields: Mapping[str, Any], known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published models of this kind and width: SO400M has 16 heads, and so has ViT-H."""
    return [
        preset
        for name, preset in MODELS.items()
        if preset.get("width") == fields["width"]
        and preset.get("gated_mlp", False) == fields["gated_mlp"]
        and published(name)["rotary"] == known["rotary"]
        and (published(name)["pool"] == "map") == (known["pool"] == "map")
    ]


def _agreed(values: Iterable[Any]) -> Any:
    found = set(values)
    return found.pop() if len(found) == 1 else None
