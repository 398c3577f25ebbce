"""The models by name, and how a name, a reducer and settings become one."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from tdm_jax.errors import InputError, unknown
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.published import PUBLISHED
from tdm_jax.models.rotary import Rotary
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, make_reducer
from tdm_jax.reduction.registry import setting_names, settings_of

MODELS: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    # No preset: every size comes from the settings.
    "vit": {},
}

_FIELDS = {
    field.name: field
    for field in dataclasses.fields(VisionTransformer)
    if field.name not in ("parent", "name", "reducer")
}


def list_models(pattern: str | None = None) -> list[str]:
    """The names that `create_model` takes, in order.

    Args:
      pattern: with the wildcards of a shell ("*dinov2*"), in any case; None for all. With a dot it
        finds names with a tag ("vit_base_patch16_224.*"), else names without.
    """
    pattern = "*" if pattern is None else pattern.lower()
    matches = fnmatch.filter(MODELS, pattern)
    return sorted(name for name in matches if ("." in name) == ("." in pattern))


def deit_preprocessing(pixels: int) -> Preprocessing:
    """What DeiT's published accuracies were measured with; at 384 pixels nothing is cut off."""
    published = "deit_base_patch16_224" if pixels < 384 else "deit_base_patch16_384"
    return MODELS[published]["preprocessing"]


def create_model(
    name: str,
    reducer: str | Reducer | Mapping[str, Any] = "none",
    keep_rate: float | tuple[float, ...] | None = None,
    **settings: Any,
) -> VisionTransformer:
    """Builds a model by name.

    Args:
      name: one of `list_models()`, timm's, with or without a tag: a tag chooses its weights'
        outputs and preprocessing. Without one, `num_classes` is 1000 for a classifier, the
        projection's width for CLIP and 0 (the pooled feature) for DINO and SigLIP. "vit" has no
        preset.
      reducer: a method's name, an object from `make_reducer`, or what `describe_reducer` says of
        one, which the settings change.
      keep_rate: share of the tokens that leaves a stage. A rate of 1 is the model without
        reduction.
      **settings: fields of `VisionTransformer`, where `image_size` may be one number, and
        `preprocessing` and `rotary` what their `describe` says; and, unless the reducer is an
        object, settings of the method (`layers`, `preset`, `r`, ...). None stands for each one's
        default.

    Raises:
      InputError: a name is unknown, a size missing, or the values do not fit together.
    """
    if name not in MODELS:
        tagged = [known for known in MODELS if known.startswith(f"{name.partition('.')[0]}.")]
        where = "" if tagged else "tdm_jax.list_models()"
        raise unknown("model", name, tagged or list_models(), where)
    known = {*_FIELDS, *_settings_of(reducer, settings)}
    for key in settings:
        if key not in known:
            raise unknown("setting", key, known)
    chosen = {key: value for key, value in settings.items() if value is not None}
    overrides = {key: chosen.pop(key) for key in _FIELDS.keys() & chosen}
    fields = {**MODELS[name], **overrides}
    missing = [
        key
        for key, field in _FIELDS.items()
        if key not in fields and field.default is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"model {name!r} needs a value for: {', '.join(missing)}")
    size = fields["image_size"]
    fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    for key, kind in (("preprocessing", Preprocessing), ("rotary", Rotary)):
        if isinstance(fields.get(key), Mapping):
            fields[key] = kind.from_description(fields[key])
    fields["preprocessing"] = _preprocessing(fields, published="preprocessing" not in overrides)
    return VisionTransformer(**fields, reducer=_reducer(reducer, keep_rate, chosen))


def _preprocessing(fields: Mapping[str, Any], *, published: bool) -> Preprocessing | None:
    prepared = fields.get("preprocessing")
    channels = fields.get("in_channels", 3)
    if prepared is None or len(prepared.mean) == channels:
        return prepared
    if published:
        return None
    raise InputError(
        f"preprocessing: expected a mean for each of the {channels} channels; got {prepared.mean}"
    )


def _settings_of(reducer: str | Reducer | Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    if isinstance(reducer, Reducer):
        return settings_of(reducer)
    if isinstance(reducer, str):
        return setting_names(reducer, given)
    return setting_names(str(reducer.get("name")), {**reducer, **given})


def _reducer(
    reducer: str | Reducer | Mapping[str, Any],
    keep_rate: float | tuple[float, ...] | None,
    settings: Mapping[str, Any],
) -> Reducer:
    if isinstance(reducer, Mapping):
        made = make_reducer(**{**reducer, **settings})
        return made if keep_rate is None else made.at_keep_rate(keep_rate)
    rate = {} if keep_rate is None else {"keep_rate": keep_rate}
    if isinstance(reducer, str):
        unreduced = reducer == "none" and keep_rate == 1
        return make_reducer(reducer, **settings, **({} if unreduced else rate))
    if rate or settings:
        raise InputError(
            f"{' and '.join([*rate, *settings])} belong to the reducer: expected them in "
            f"make_reducer(); got a reducer object"
        )
    return reducer
