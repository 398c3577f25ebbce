"""Parameters back to PyTorch's world, with timm's names: the exact inverse of loading."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from tdm_jax.checkpoint.descriptions import describe
from tdm_jax.checkpoint.names import Naming, to_torch
from tdm_jax.errors import InputError
from tdm_jax.files import replacing
from tdm_jax.models.vit import VisionTransformer

METADATA = "tdm_jax"  # the key in a .safetensors file under which our description stands


def to_state_dict(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters as timm names and lays them out: what `model.load_state_dict` takes there.

    A learned reducer's weights keep their path ("reducer/...").

    Raises:
      InputError: the tree is not that of a vision transformer.
    """
    if "params" not in variables:
        names = sorted(variables)
        raise InputError(f"expected what model.init returns, with 'params'; got {names}")
    return to_torch(Naming("timm"), traverse_util.flatten_dict(variables["params"], sep="/"))


def save_safetensors(
    path: str | PathLike[str],
    model: VisionTransformer,
    variables: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a .safetensors file with timm's names.

    What the arrays do not tell (heads, epsilon, reducer, preprocessing, a grid that is not square)
    goes into the file's metadata, where `load_pretrained` finds it and other programs do not look.

    Args:
      path: of the file; it must not exist unless `overwrite`.
      model: whose variables these are.
      variables: what `model.init` returned.
      overwrite: replace a file that exists, once the new one is complete.

    Raises:
      InputError: the file exists or cannot be written, or the tree is another.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists (--overwrite would replace it); expected a new name")
    metadata = {"format": "pt", METADATA: json.dumps(describe(model))}
    arrays = to_state_dict(variables)
    with replacing(path) as beside:
        save_file(arrays, beside, metadata)
