"""Where weights come from: any kind of file or folder becomes named arrays and a description.

Nothing is renamed here; `names` knows what the names mean.
"""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from etils import epath

from tdm_jax.checkpoint.descriptions import from_hugging_face, from_ours, from_timm
from tdm_jax.checkpoint.export import METADATA, flat
from tdm_jax.checkpoint.lazy_arrays import read_npz, read_safetensors, read_shards
from tdm_jax.checkpoint.names import Naming, to_torch
from tdm_jax.checkpoint.saved_model import is_saved_model, load_model
from tdm_jax.checkpoint.torch_file import read_torch_file
from tdm_jax.checkpoint.workdir import is_workdir, load_workdir
from tdm_jax.errors import InputError
from tdm_jax.files import parse_json, reach, read_json

_INDEX = ".index.json"  # of weights in several files
_WEIGHTS = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", _INDEX)
)
# Where training programs put the weights, and their moving average, beside everything else.
_PLAIN, _EMA = ("model", "state_dict", "teacher"), ("model_ema", "state_dict_ema")
_BACKBONE = "backbone."  # of DINO's teacher, which has a head of its own beside it


@dataclasses.dataclass(frozen=True)
class RawCheckpoint:
    """A checkpoint as it was found.

    Attributes:
      path: for messages.
      arrays: by the names in the file; those in a file on a disk are mapped when asked for.
      description: what stands beside them of the model, as `create_model` takes it: its size in
        pixels, heads, epsilon, classes, reducer, preprocessing; as much of it as is known.
    """

    path: str
    arrays: Mapping[str, np.ndarray]
    description: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_raw_checkpoint(path: str | PathLike[str], *, ema: bool = False) -> RawCheckpoint:
    """Reads a checkpoint of any kind.

    Args:
      path: a PyTorch file (.pth, .pt, .bin), a .safetensors or .npz file, a folder of Hugging Face,
        timm or `save_model`, or a training's working directory; each on a disk or in a store
        (gs://...).
      ema: take the moving average of the weights that a training keeps.

    Raises:
      InputError: there is nothing that could be read, or it is damaged.
    """
    path = reach(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a checkpoint")
    if is_saved_model(path):
        checkpoint = _from_model(path, *load_model(path))
    elif is_workdir(path):
        return _from_model(path, *load_workdir(path, ema=ema))
    elif path.is_dir():
        checkpoint = _from_folder(path)
    elif path.suffix == ".safetensors":
        checkpoint = _from_safetensors(path)
    elif path.suffix == ".npz":
        checkpoint = RawCheckpoint(str(path), read_npz(path))
    else:
        return RawCheckpoint(str(path), _state_dict(path, read_torch_file(path), ema=ema))
    if ema:
        raise InputError(
            f"{path}: no moving average here; expected a training's .pth or working directory"
        )
    return checkpoint


def _state_dict(path: epath.Path, content: Any, *, ema: bool = False) -> dict[str, np.ndarray]:
    if isinstance(content, dict):
        keys = _EMA if ema else _PLAIN
        inner = [content[key] for key in keys if isinstance(content.get(key), dict)]
        if inner:
            content = inner[0]
        elif ema:
            raise InputError(f"{path}: expected {' or '.join(_EMA)}; got {_some(content)}")
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected named tensors; got {type(content).__name__}")
    tensors = (isinstance(k, str) and isinstance(v, np.ndarray) for k, v in content.items())
    if not all(tensors):
        raise InputError(
            f"{path}: expected named tensors, or {' or '.join(_PLAIN)} with them; got "
            f"{_some(content)}"
        )
    of_backbone = [name for name in content if name.startswith(_BACKBONE)]
    return {name.removeprefix(_BACKBONE): content[name] for name in of_backbone or content}


def _some(names: Any, most: int = 8) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if listed[most:] else "")


def _from_safetensors(path: epath.Path) -> RawCheckpoint:
    arrays, metadata = read_safetensors(path)
    if METADATA not in metadata:
        return RawCheckpoint(str(path), arrays)
    return RawCheckpoint(str(path), arrays, from_ours(path, parse_json(path, metadata[METADATA])))


def _from_model(
    path: epath.Path, description: dict[str, Any], variables: dict[str, Any]
) -> RawCheckpoint:
    try:
        arrays = to_torch(Naming("timm"), flat(variables))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return RawCheckpoint(str(path), arrays, from_ours(path, description))


def _from_folder(path: epath.Path) -> RawCheckpoint:
    """A folder of Hugging Face or timm."""
    files = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not (path / "config.json").is_file() or not files:
        raise InputError(
            f"{path}: no checkpoint in this folder; expected config.json with "
            f"{' or '.join(_WEIGHTS)}, or what tdm_jax wrote; got "
            f"{_some(child.name for child in path.iterdir()) or 'nothing'}"
        )
    config = read_json(path / "config.json")
    if files[0].suffix == ".safetensors":
        checkpoint = _from_safetensors(files[0])
        if checkpoint.description:  # ours says more than a config.json can
            return checkpoint
        arrays = checkpoint.arrays
    else:
        arrays = _read(files[0]) if files[0].suffix != ".json" else read_shards(files[0], _read)
    if "pretrained_cfg" in config:
        return RawCheckpoint(str(path), arrays, from_timm(path, config))
    processor = path / "preprocessor_config.json"
    processing = read_json(processor) if processor.is_file() else None
    return RawCheckpoint(str(path), arrays, from_hugging_face(path, config, processing))


def _read(path: epath.Path) -> Mapping[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    return _state_dict(path, read_torch_file(path))
