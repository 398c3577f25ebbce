"""What stands beside a checkpoint's arrays: our own description of a model, Hugging Face's, timm's.

Each becomes keyword arguments of `create_model`, as far as it tells what no array does.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tdm_jax.checkpoint.families import published
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.registry import MODELS, create_model
from tdm_jax.models.rotary import Rotary
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, describe_reducer

# Fields that decide what the parameters are and what they compute; the rest is how training runs.
_DESCRIBED = (
    "image_size", "patch_size", "width", "depth", "num_heads", "num_classes", "in_channels",
    "mlp_ratio", "distilled", "class_token", "num_registers", "positions", "interpolation",
    "patch_bias", "pre_norm", "layer_norm_eps", "qkv_bias", "activation", "gated_mlp", "mlp_norm",
    "layer_scale", "pool", "fc_norm", "head_bias",
)  # fmt: skip
# Of those, what the shapes of a model's arrays do not tell.
_UNTOLD = (
    "image_size", "num_heads", "positions", "interpolation", "layer_norm_eps", "qkv_bias",
    "activation", "pool", "rotary", "preprocessing", "patch_bias", "head_bias",
)  # fmt: skip
_TIMM_POOLS = ("token", "avg", "map", "")
# Models of timm that have the same arrays as a family here, and compute something else with them.
_UNLIKE = re.compile(r"rope|_pe_|beit|enormous|flexivit")
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def describe(model: VisionTransformer) -> dict[str, Any]:
    """What `create_model` takes to build a model of the same weights, as JSON can hold it.

    Its reducer is among it (see `describe_reducer`) unless that is "none", and how its images are
    prepared, where the model says so.

    Raises:
      InputError: the reducer is no method of the table.
    """
    description = {"name": "vit", **{name: getattr(model, name) for name in _DESCRIBED}}
    description["image_size"] = list(model.image_size)
    if model.rotary is not None:
        description["rotary"] = model.rotary.describe()
    if model.reducer != Reducer():
        description["reducer"] = describe_reducer(model.reducer)
    if model.preprocessing is not None:
        description["preprocessing"] = model.preprocessing.describe()
    return description


def from_ours(path: object, description: Mapping[str, Any]) -> dict[str, Any]:
    """From what `describe` says, or other keyword arguments of `create_model`."""
    try:
        model = create_model(**description)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: it describes no model of ours: {error}") from error
    reducer = {} if model.reducer == Reducer() else {"reducer": describe_reducer(model.reducer)}
    return {name: getattr(model, name) for name in _UNTOLD} | reducer


class _Class(NamedTuple):
    """What a configuration class of transformers fills in where config.json is silent."""

    hidden_act: str
    layer_norm_eps: float
    num_attention_heads: int = 12


_VIT, _DINOV2 = _Class("gelu", 1e-12), _Class("gelu", 1e-6)
_SIGLIP, _CLIP = _Class("gelu_pytorch_tanh", 1e-6), _Class("quick_gelu", 1e-5)
_CLASSES = {
    **dict.fromkeys(("vit", "deit", "vit_mae"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "dinov3_vit": _Class("gelu", 1e-5, 6),
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"), _SIGLIP),
    **dict.fromkeys(("clip", "clip_vision_model"), _CLIP),
}
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}


def from_hugging_face(
    path: object, config: Mapping[str, Any], processor: Mapping[str, Any] | None
) -> dict[str, Any]:
    """From a folder's config.json and, where there is one, its preprocessor_config.json."""
    file, kind = f"{path}/config.json", config.get("model_type")
    if kind not in _CLASSES:
        raise InputError(
            f"{file}: model_type {kind!r} is another architecture; expected {', '.join(_CLASSES)}"
        )
    vision = config.get("vision_config", config)  # of a whole model with a text tower
    if not isinstance(vision, Mapping):
        raise InputError(f"{file}: expected vision_config as an object; got {vision!r}")
    values = {**_CLASSES[kind]._asdict(), **vision}
    known: dict[str, Any] = {
        "num_heads": _number(path, values, "num_attention_heads", int),
        "layer_norm_eps": _number(path, values, "layer_norm_eps", float),
        "activation": _activation(file, "hidden_act", values["hidden_act"]),
    }
    if values.get("use_swiglu_ffn"):
        known["activation"] = "silu"  # whatever hidden_act says
    if "num_register_tokens" in values:
        known["num_registers"] = _number(path, values, "num_register_tokens", int, zero=True)
    if kind == "dinov3_vit":
        temperature = _number(path, {"rope_theta": 100.0} | values, "rope_theta", float)
        known["rotary"] = Rotary(temperature)
        values.setdefault("image_size", 224)
    if "image_size" in values:
        known["image_size"] = _pair(path, values["image_size"])
    if "num_labels" in config:
        known["num_classes"] = _number(path, config, "num_labels", int)
    if isinstance(config.get("id2label"), dict):
        known["num_classes"] = len(config["id2label"])
    if processor is not None:
        known["preprocessing"] = _processor(path, kind, processor)
    return known


def _activation(file: str, key: str, name: object) -> str:
    if name not in _ACTIVATIONS:
        raise unknown(f"{key} in {file}", name, _ACTIVATIONS)
    return _ACTIVATIONS[str(name)]


def _processor(path: object, model_type: str, values: Mapping[str, Any]) -> Preprocessing:
    """Hugging Face's image processor; one that resizes without cropping becomes a whole crop."""
    # What transformers fills in where an old file is silent.
    resample = values.get("resample", 3 if model_type == "deit" else 2)
    if not isinstance(resample, int) or resample not in _PILLOW:
        raise InputError(
            f"{path}/preprocessor_config.json: expected resample 0 (nearest), 1 (lanczos), "
            f"2 (bilinear) or 3 (bicubic); got {resample!r}"
        )
    try:
        size, crop = (_shortest_edge(values.get(name)) for name in ("size", "crop_size"))
        crops = crop and size and values.get("do_center_crop", True)
        mean, std = values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)
        if not values.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        # (r x - mean) / std of x in [0, 255] is (x / 255 - mean / s) / (std / s) with s = 255 r.
        rescaled = values.get("do_rescale", True)
        scale = 255 * (values.get("rescale_factor", 1 / 255) if rescaled else 1)
        return Preprocessing(
            mean=tuple(value / scale for value in mean),
            std=tuple(value / scale for value in std),
            crop_pct=crop / size if crops else 1.0,
            interpolation=_PILLOW[resample],
        )
    except (InputError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}/preprocessor_config.json: {error}") from error


def _shortest_edge(size: Any) -> Any:
    return min(size.values()) if isinstance(size, Mapping) else size


def from_timm(path: object, config: Mapping[str, Any]) -> dict[str, Any]:
    """From a folder's config.json as timm writes it for the Hugging Face hub."""
    pretrained = config["pretrained_cfg"]
    if not isinstance(pretrained, Mapping):
        raise InputError(f"{path}/config.json: expected pretrained_cfg as an object")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"{path}/config.json: expected model_args as an object")
    known = _named(path, str(config.get("architecture", "")).partition(".")[0])
    if "num_classes" in config and config["num_classes"] != 0:
        known["num_classes"] = _number(path, config, "num_classes", int)
    size = arguments.get("img_size", pretrained.get("input_size"))
    if size is not None:
        known["image_size"] = _pair(path, size[-2:] if isinstance(size, list) else size)
    if "num_heads" in arguments:
        known["num_heads"] = _number(path, arguments, "num_heads", int)
    for name in ("reg_tokens", "num_reg_tokens"):
        if name in arguments:
            known["num_registers"] = _number(path, arguments, name, int, zero=True)
    if known.get("rotary") and "ref_feat_shape" in arguments:
        grid = _pair(path, arguments["ref_feat_shape"], "ref_feat_shape")
        known["rotary"] = dataclasses.replace(known["rotary"], reference_grid=grid[0])
    if isinstance(arguments.get("act_layer"), str):
        known["activation"] = _activation(
            f"{path}/config.json", "act_layer", arguments["act_layer"]
        )
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool not in (None, *_TIMM_POOLS):
        raise InputError(
            f"{path}/config.json: expected global_pool {', '.join(map(repr, _TIMM_POOLS))}; got "
            f"{pool!r}"
        )
    if pool:
        known["pool"] = pool
    names = ("mean", "std", "crop_pct", "interpolation")
    try:
        known["preprocessing"] = Preprocessing.from_description(
            {name: pretrained[name] for name in names if name in pretrained}
        )
    except InputError as error:
        raise InputError(f"{path}/config.json: {error}") from error
    return known


def _named(path: object, name: str) -> dict[str, Any]:
    if name in MODELS:
        preset = MODELS[name]
        counts = {"num_heads": preset["num_heads"], "num_registers": preset.get("num_registers", 0)}
        return published(name) | counts
    if _UNLIKE.search(name):
        raise InputError(
            f"{path}/config.json: {name}: not supported: positions or tokens of another kind; "
            "expected one of tdm_jax.list_models() or of the same family"
        )
    return {}


def _number(
    path: object, config: Mapping[str, Any], name: str, kind: type[Any], *, zero: bool = False
) -> Any:
    value = config[name]
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or value < 0 or (value == 0 and not zero):
        sign = "non-negative" if zero else "positive"
        raise InputError(f"{path}: expected a {sign} {kind.__name__} for {name}; got {value!r}")
    return value


def _pair(path: object, size: Any, name: str = "image_size") -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(f"{path}: expected {name} as one or two numbers; got {size!r}")
    return pair
