"""What stands beside a checkpoint's arrays: our own description of a model, Hugging Face's, timm's.

Each becomes keyword arguments of `create_model`, as far as it tells what no array does.
"""

from collections.abc import Mapping
from typing import Any

from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, describe_reducer

# Fields that decide what the parameters are and what they compute; the rest is how training runs.
_DESCRIBED = (
    "image_size", "patch_size", "width", "depth", "num_heads", "num_classes", "in_channels",
    "mlp_ratio", "distilled", "class_token", "num_registers", "layer_norm_eps",
)  # fmt: skip
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
    names = ("image_size", "num_heads", "layer_norm_eps", "preprocessing")
    reducer = {} if model.reducer == Reducer() else {"reducer": describe_reducer(model.reducer)}
    return {name: getattr(model, name) for name in names} | reducer


def from_hugging_face(
    path: object, config: Mapping[str, Any], processor: Mapping[str, Any] | None
) -> dict[str, Any]:
    """From a folder's config.json and, where there is one, its preprocessor_config.json."""
    for key, expected in (("model_type", ("vit", "deit")), ("hidden_act", ("gelu",))):
        if key not in config or config[key] not in expected:
            got = repr(config[key]) if key in config else "nothing"
            raise InputError(
                f"{path}/config.json: expected {key} {' or '.join(map(repr, expected))}; got {got}"
            )
    known: dict[str, Any] = {}
    if "image_size" in config:
        known["image_size"] = _pair(path, config["image_size"])
    for field, name, kind in (
        ("num_heads", "num_attention_heads", int),
        ("layer_norm_eps", "layer_norm_eps", float),
        ("num_classes", "num_labels", int),
    ):
        if name in config:
            known[field] = _number(path, config, name, kind)
    if isinstance(config.get("id2label"), dict):
        known["num_classes"] = len(config["id2label"])
    if processor is not None:
        known["preprocessing"] = _processor(path, config["model_type"], processor)
    return known


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
    known: dict[str, Any] = {}
    if "num_classes" in config:
        known["num_classes"] = _number(path, config, "num_classes", int)
    if "input_size" in pretrained:
        size = pretrained["input_size"]
        known["image_size"] = _pair(path, size[1:] if isinstance(size, list) else size)
    names = ("mean", "std", "crop_pct", "interpolation")
    try:
        known["preprocessing"] = Preprocessing.from_description(
            {name: pretrained[name] for name in names if name in pretrained}
        )
    except InputError as error:
        raise InputError(f"{path}/config.json: {error}") from error
    return known


def _number(path: object, config: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = config[name]
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{path}: expected a positive {kind.__name__} for {name}; got {value!r}")
    return value


def _pair(path: object, size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(f"{path}: expected image_size as one or two numbers; got {size!r}")
    return pair
