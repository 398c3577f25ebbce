"""A model as Hugging Face has it: its class there, config.json, preprocessor_config.json, names."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tdm_jax.checkpoint.name_tables import Scheme
from tdm_jax.checkpoint.names import Naming, to_torch
from tdm_jax.checkpoint.rewriting import Params, rewritten
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.rotary import Rotary
from tdm_jax.models.vit import VisionTransformer

_PILLOW = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # the others have our names
# What a ViT has there; None, among the fields of another family, where anything will do.
_FIELDS: dict[str, Any] = {
    "class_token": True,
    "distilled": False,
    "num_registers": 0,
    "positions": "all",
    "pre_norm": False,
    "patch_bias": True,
    "layer_scale": False,
    "gated_mlp": False,
    "mlp_norm": False,
    "fc_norm": False,
    "pooling": "token",
    "qkv_bias": "qkv",
    "head_bias": True,
}
_SCALED = {"layer_scale": True, "gated_mlp": None}


class _Family(NamedTuple):
    """What the models of a family are in transformers.

    Attributes:
      model_type: in config.json.
      plain: the class without a head.
      headed: the class with one; None where there is none.
      within: what stands before the names of a model that has a head.
      scheme: of the names.
      fields: where they are not those of a ViT.
      mask_token: the axes of one, which no forward pass of ours needs and the class has; or 0.
    """

    model_type: str
    plain: str
    headed: str | None
    within: str
    scheme: Scheme
    fields: Mapping[str, Any]
    mask_token: int = 0


_VIT = _Family("vit", "ViTModel", "ViTForImageClassification", "vit.", "hf", {})
_DEIT = _Family(
    "deit", "DeiTModel", "DeiTForImageClassificationWithTeacher", "deit.", "hf", {"distilled": True}
)
_DINOV2 = _Family(
    "dinov2", "Dinov2Model", "Dinov2ForImageClassification", "dinov2.", "hf", _SCALED, 2
)
_REGISTERS = _Family(
    "dinov2_with_registers",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
    "dinov2_with_registers.",
    "hf",
    {**_SCALED, "num_registers": None},
    2,
)
_DINOV3 = _Family(
    "dinov3_vit",
    "DINOv3ViTModel",
    None,
    "",
    "hf_dinov3",
    {**_SCALED, "num_registers": None, "positions": "none", "qkv_bias": None},
    3,
)
_SIGLIP = _Family(
    "siglip_vision_model",
    "SiglipVisionModel",
    None,
    "",
    "hf_clip",
    {"class_token": False, "pooling": "map"},
)
_CLIP = _Family(
    "clip_vision_model",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "vision_model.",
    "hf_clip",
    {"pre_norm": True, "patch_bias": False, "head_bias": False},
)


def _family(model: VisionTransformer) -> _Family:
    """By what the other families do not have."""
    if model.rotary is not None:
        return _DINOV3
    if model.pre_norm:
        return _CLIP
    if not model.class_token:
        return _SIGLIP
    if model.distilled:
        return _DEIT
    if model.num_registers:
        return _REGISTERS
    return _DINOV2 if model.layer_scale else _VIT


def to_hugging_face(
    model: VisionTransformer, params: Params
) -> tuple[VisionTransformer, dict[str, Any], dict[str, np.ndarray]]:
    """A model as a class of transformers has it.

    Returns:
      The model that the arrays are of, which computes the same; config.json; the arrays.

    Raises:
      InputError: transformers has no such class.
    """
    family = _family(model)
    cls = _class(model, family)
    model, params = rewritten(model, params, _fields(model, family), f"Hugging Face's {cls}")
    config = hugging_face_config(model)
    forms = {"layer_scale1"} if model.layer_scale else set()
    if model.gated_mlp:
        forms.add("weights_in" if family.scheme == "hf" else "gate_proj")
    if model.distilled:
        forms.add("cls_classifier")
    prefix = family.within if model.num_classes else ""
    naming = Naming(family.scheme, prefix, frozenset(forms), model.qkv_bias)
    arrays = to_torch(naming, params)
    if family.mask_token:
        shape = (*[1] * (family.mask_token - 1), model.width)
        arrays[f"{prefix}embeddings.mask_token"] = np.zeros(shape, np.float32)
    if family is _DINOV3 and not model.num_registers:
        arrays["embeddings.register_tokens"] = np.zeros((1, 0, model.width), np.float32)
    return model, config, arrays


def _class(model: VisionTransformer, family: _Family) -> str:
    if model.rotary not in (None, Rotary(getattr(model.rotary, "temperature", 0.0))):
        raise InputError(
            f"Hugging Face has rotary positions of DINOv3 alone; got EVA-02's: {model.rotary}: "
            "expected another --format"
        )
    cls = family.headed if model.num_classes else family.plain
    if cls is None:
        raise InputError(
            f"Hugging Face has no {family.plain} with a head; got num_classes="
            f"{model.num_classes}: expected --num_classes=0 or another --format"
        )
    return cls


def _fields(model: VisionTransformer, family: _Family) -> dict[str, Any]:
    fields = {**_FIELDS, **family.fields}
    if family in (_DINOV2, _REGISTERS) and model.num_classes:
        fields["pooling"] = "token_avg"
    if family is not _CLIP and family is not _SIGLIP and not model.qkv_bias:
        fields["qkv_bias"] = ""
    if model.gated_mlp and family.scheme == "hf":
        fields["activation"] = "silu"
    if not model.num_classes:
        fields.pop("head_bias")
    return {name: value for name, value in fields.items() if value is not None}


def hugging_face_config(model: VisionTransformer) -> dict[str, Any]:
    """The config.json of a model that `to_hugging_face` returned."""
    family = _family(model)
    cls = _class(model, family)
    height, width = model.image_size
    silent = family.scheme == "hf" and model.gated_mlp  # what is gated there is by SiLU
    activation = "gelu" if silent else model.activation
    config = {
        "architectures": [cls],
        "model_type": family.model_type,
        "dtype": "float32",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "num_channels": model.in_channels,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "hidden_act": _ACTIVATIONS.get(activation, activation),
        "layer_norm_eps": model.layer_norm_eps,
    }
    if family in (_DINOV2, _REGISTERS):
        config |= {"mlp_ratio": _mlp_ratio(model, cls), "use_swiglu_ffn": model.gated_mlp}
    else:
        config["intermediate_size"] = model.mlp_hidden
    if family.scheme == "hf":
        config["qkv_bias"] = model.qkv_bias != ""
    if family in (_REGISTERS, _DINOV3):
        config["num_register_tokens"] = model.num_registers
    if family is _CLIP and model.num_classes:
        config["projection_dim"] = model.num_classes
    elif model.num_classes:
        labels = [f"LABEL_{i}" for i in range(model.num_classes)]
        config["id2label"] = dict(zip(map(str, range(len(labels))), labels, strict=True))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if model.rotary is not None:
        config["rope_theta"] = model.rotary.temperature
        config["use_gated_mlp"] = model.gated_mlp
        config |= {f"{name}_bias": name[0] in model.qkv_bias for name in ("query", "key", "value")}
    return config


def _mlp_ratio(model: VisionTransformer, cls: str) -> int:
    """The whole number from which the class computes how many channels there are."""
    for ratio in range(1, 2 * math.ceil(model.mlp_ratio) + 2):
        hidden = model.width * ratio
        if model.gated_mlp:
            hidden = (hidden * 2 // 3 + 7) // 8 * 8
        if hidden == model.mlp_hidden:
            return ratio
    raise InputError(
        f"Hugging Face's {cls} has a whole mlp_ratio"
        f"{', of which it takes two thirds' if model.gated_mlp else ''}; got {model.mlp_hidden} "
        f"channels for a width of {model.width}: expected another --format"
    )


def processor_config(preprocessing: Preprocessing, image_size: tuple[int, int]) -> dict[str, Any]:
    """The preprocessor_config.json of a processor that resizes, then crops the centre."""
    height, width = image_size
    edge = math.floor(min(image_size) / preprocessing.crop_pct)
    return {
        "image_processor_type": "BitImageProcessor",  # DINOv2's
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge},
        "resample": _PILLOW[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
