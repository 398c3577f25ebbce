"""The DeiT family by name, and how a name, a reducer and overrides become a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tdm_jax.errors import InputError, unknown
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, make_reducer

_SIZES = {
    "tiny": {"width": 192, "num_heads": 3},
    "small": {"width": 384, "num_heads": 6},
    "base": {"width": 768, "num_heads": 12},
}


def _variant(size: str, pixels: int, distilled: bool = False) -> dict[str, Any]:
    return {
        "image_size": (pixels, pixels),
        "patch_size": 16,
        "depth": 12,
        "num_classes": 1000,
        "distilled": distilled,
        **_SIZES[size],
    }


MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": _variant("tiny", 224),
    "deit_small_patch16_224": _variant("small", 224),
    "deit_base_patch16_224": _variant("base", 224),
    "deit_base_patch16_384": _variant("base", 384),
    "deit_tiny_distilled_patch16_224": _variant("tiny", 224, distilled=True),
    "deit_small_distilled_patch16_224": _variant("small", 224, distilled=True),
    "deit_base_distilled_patch16_224": _variant("base", 224, distilled=True),
    "deit_base_distilled_patch16_384": _variant("base", 384, distilled=True),
    # No preset: every size comes from the overrides.
    "vit": {},
}

_FIELDS = {
    field.name: field
    for field in dataclasses.fields(VisionTransformer)
    if field.name not in ("parent", "name", "reducer")
}


def create_model(
    name: str,
    reducer: str | Reducer | Mapping[str, Any] = "none",
    keep_rate: float | tuple[float, ...] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Builds a model by name.

    Args:
      name: one of `MODELS`; "vit" has no preset.
      reducer: a method's name, an object from `make_reducer`, or what `describe_reducer` says of
        one.
      keep_rate: share of the tokens that leaves a stage; with a reducer by name only, None for its
        default. A rate of 1 is the model without reduction.
      **overrides: fields of `VisionTransformer`; `image_size` may be one number. With a reducer by
        name, also `layers`, the blocks where it acts.

    Raises:
      InputError: a name is unknown, a size missing, or the values do not fit together.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    settings = {} if keep_rate is None else {"keep_rate": keep_rate}
    if "layers" in overrides:
        settings["layers"] = tuple(overrides.pop("layers"))
    if isinstance(reducer, Mapping):
        reducer = make_reducer(**reducer)
    if not isinstance(reducer, str):
        if settings:
            raise InputError(
                f"{' and '.join(settings)} belong to the reducer: expected them in make_reducer(); "
                f"got a reducer object and {settings}"
            )
    elif reducer == "none" and settings.get("keep_rate", 1) == 1:
        reducer = Reducer()
    else:
        reducer = make_reducer(reducer, **settings)
    for key in overrides:
        if key not in _FIELDS:
            raise unknown("model setting", key, _FIELDS)
    fields = {**MODELS[name], **overrides}
    missing = [
        key
        for key, field in _FIELDS.items()
        if key not in fields and field.default is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"model {name!r} needs a value for: {', '.join(missing)}")
    if isinstance(fields["image_size"], int):
        fields["image_size"] = (fields["image_size"],) * 2
    fields["image_size"] = tuple(fields["image_size"])
    return VisionTransformer(**fields, reducer=reducer)
