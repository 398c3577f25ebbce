"""The same function with other parameters: how a tree becomes one that another program can hold.

Programs differ in what they leave out. A bias that is not there is one of zeros, a class token
without position has a position of zeros, and a class token's position can be a part of the token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tdm_jax.errors import InputError
from tdm_jax.models.vit import VisionTransformer

Params = dict[str, np.ndarray]  # by our paths
_CHOICES = ("pool", "num_classes", "activation")  # what one may ask of a file when it is loaded


def rewritten(
    model: VisionTransformer, params: Params, wanted: Mapping[str, Any], whose: str
) -> tuple[VisionTransformer, Params]:
    """A model with the fields that are wanted, and its parameters, which compute the same.

    Args:
      model: whose parameters these are.
      params: by path; they are not changed.
      wanted: fields of `VisionTransformer`, or its property `pooling`.
      whose: model that is; for the message.

    Raises:
      InputError: no parameters of the wanted model compute the same.
    """
    params = dict(params)
    for field, value in wanted.items():
        got = getattr(model, field)
        if got == value:
            continue
        if field not in _CHANGES or not _CHANGES[field](model, params, value):
            name = "pool" if field == "pooling" else field
            choice = f" --{name}={value}," if name in _CHOICES else ""
            raise InputError(
                f"{whose} has {name}={value!r}; got {got!r}: expected{choice} a model of that kind "
                "or another --format"
            )
        model = model.clone(**{field: value})
    return model, params


def _positions(model: VisionTransformer, params: Params, value: str) -> bool:
    if "none" in (value, model.positions):
        return False
    tokens = ["cls_token", "dist_token"][: model.class_token + model.distilled]
    table = params["pos_embed"]
    if value == "all":
        zeros = np.zeros((1, len(tokens), model.width), table.dtype)
        params["pos_embed"] = np.concatenate([zeros, table], axis=1)
        return True
    for i, token in enumerate(tokens):
        params[token] = params[token] + table[:, i : i + 1]
    params["pos_embed"] = table[:, len(tokens) :]
    return True


def _qkv_bias(model: VisionTransformer, params: Params, value: str) -> bool:
    if not set(model.qkv_bias) <= set(value):
        return False
    for i in range(model.depth):
        path = f"blocks_{i}/attn/qkv/bias"
        parts = np.split(params[path], len(model.qkv_bias)) if model.qkv_bias else []
        there = dict(zip(model.qkv_bias, parts, strict=True))
        zeros = np.zeros(model.width, np.float32)
        params[path] = np.concatenate([there.get(part, zeros) for part in value])
    return True


def _bias(path: str, features: str) -> Callable[[VisionTransformer, Params, bool], bool]:
    def change(model: VisionTransformer, params: Params, value: bool) -> bool:
        if value:
            params[path] = np.zeros(getattr(model, features), np.float32)
            return True
        return not params.pop(path).any()

    return change


# Each changes the parameters and says whether it could.
_CHANGES: dict[str, Callable[[VisionTransformer, Params, Any], bool]] = {
    "positions": _positions,
    "qkv_bias": _qkv_bias,
    "patch_bias": _bias("patch_embed/proj/bias", "width"),
    "head_bias": _bias("head/bias", "num_classes"),
}
