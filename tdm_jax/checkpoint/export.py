"""Models for other programs: a file or folder of timm's, a folder of Hugging Face's."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save_file

from tdm_jax.checkpoint.descriptions import describe
from tdm_jax.checkpoint.hugging_face import processor_config, to_hugging_face
from tdm_jax.checkpoint.names import REDUCER
from tdm_jax.checkpoint.rewriting import Params
from tdm_jax.checkpoint.timm import timm_config, to_timm
from tdm_jax.errors import InputError
from tdm_jax.files import replacing, replacing_folder
from tdm_jax.models.vit import VisionTransformer

METADATA = "tdm_jax"  # the key in a .safetensors file under which our description stands
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")  # of a folder


def to_state_dict(model: VisionTransformer, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters as timm names and lays them out: what `model.load_state_dict` takes there.

    A learned reducer's weights keep their path ("reducer/...").

    Args:
      model: whose variables these are.
      variables: what `model.init` returned.

    Raises:
      InputError: the tree is not that of a vision transformer, or timm has no such model.
    """
    return _contiguous(to_timm(model, flat(variables))[1])


def _contiguous(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def flat(variables: dict[str, Any]) -> Params:
    """Parameters by path.

    Raises:
      InputError: there are none.
    """
    if "params" not in variables:
        names = sorted(variables)
        raise InputError(f"expected what model.init returns, with 'params'; got {names}")
    tree = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: np.asarray(value) for path, value in tree.items()}


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
      InputError: the file exists or cannot be written, the tree is another, or timm has no such
        model.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists (--overwrite would replace it); expected a new name")
    model, arrays = to_timm(model, flat(variables))
    _write(path, model, arrays)


def _write(path: Path, model: VisionTransformer, arrays: dict[str, np.ndarray]) -> None:
    metadata = {"format": "pt", METADATA: json.dumps(describe(model))}
    with replacing(path) as beside:
        save_file(_contiguous(arrays), beside, metadata)


def save_timm(
    path: str | PathLike[str],
    model: VisionTransformer,
    variables: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder that timm opens as `local-dir:`, and `load_pretrained` as any other.

    Args:
      path: of the folder; it must not exist unless `overwrite` and one like it is there.
      model: whose variables these are.
      variables: what `model.init` returned.
      overwrite: replace a folder that exists, once the new one is complete.

    Raises:
      InputError: as `save_safetensors`.
    """
    model, arrays = to_timm(model, flat(variables))
    config = timm_config(model)
    with replacing_folder(Path(path), overwrite=overwrite, ours=is_exported) as folder:
        _write(folder / "model.safetensors", model, arrays)
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def save_hugging_face(
    path: str | PathLike[str],
    model: VisionTransformer,
    variables: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder that the model's class in transformers loads, and `load_pretrained` as well.

    Args:
      path: of the folder; it must not exist unless `overwrite` and one like it is there.
      model: whose variables these are.
      variables: what `model.init` returned.
      overwrite: replace a folder that exists, once the new one is complete.

    Raises:
      InputError: as `save_safetensors`; or transformers has no such model, nor a place for the
        weights of a learned reducer.
    """
    params = flat(variables)
    if any(name.startswith(REDUCER) for name in params):
        raise InputError(
            f"Hugging Face has no place for the weights of {model.reducer.title}: "
            "expected another --format"
        )
    model, config, arrays = to_hugging_face(model, params)
    with replacing_folder(Path(path), overwrite=overwrite, ours=is_exported) as folder:
        _write(folder / "model.safetensors", model, arrays)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        if model.preprocessing is not None:
            processor = processor_config(model.preprocessing, model.image_size)
            (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def is_exported(path: str | PathLike[str]) -> bool:
    """Whether this is a folder with what the writers of this module write and nothing else."""
    folder = epath.Path(path)
    names = {child.name for child in folder.iterdir()} if folder.is_dir() else set()
    return names >= set(_FILES[:2]) and names <= set(_FILES)
