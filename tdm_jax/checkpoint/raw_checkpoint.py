"""Where weights come from: any kind of file or folder becomes named arrays and facts about them.

Nothing is renamed here; `names` knows what the names mean.
"""

import dataclasses
import json
import re
from os import PathLike
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy, and so safetensors, the type bfloat16)
import numpy as np
import safetensors
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file

from tdm_jax.checkpoint.names import Naming, to_theirs
from tdm_jax.checkpoint.saved_model import is_saved_model, load_model
from tdm_jax.checkpoint.torch_file import read_torch_file
from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model

METADATA = "tdm_jax"  # the entry of a .safetensors file that holds our description of the model
_HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Where training programs put the weights, and their moving average, beside everything else.
_PLAIN, _EMA = ("model", "state_dict"), ("model_ema", "state_dict_ema")


@dataclasses.dataclass(frozen=True)
class RawCheckpoint:
    """A checkpoint as it was found.

    Attributes:
      path: for messages.
      arrays: by the names in the file.
      image_size: what a description beside the arrays says of it, None if there is none; so too
      num_heads: (no array tells),
      layer_norm_eps: (no array tells) and
      num_classes: where the arrays may have no head.
      reducer: `reducer` and what belongs to it, as `create_model` takes them, if it was saved with
        one.
    """

    path: str
    arrays: dict[str, np.ndarray]
    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    layer_norm_eps: float | None = None
    num_classes: int | None = None
    reducer: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_raw_checkpoint(path: str | PathLike[str], *, ema: bool = False) -> RawCheckpoint:
    """Reads a checkpoint of any kind.

    Args:
      path: a PyTorch file (.pth, .pt, .bin), a .safetensors file, a Hugging Face folder, or a
        folder that `save_model` wrote.
      ema: take the moving average of a training checkpoint's weights.

    Raises:
      InputError: there is nothing that could be read, or it is damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a checkpoint")
    if is_saved_model(path):
        source = _from_orbax(path)
    elif path.is_dir():
        source = _from_hugging_face(path)
    elif path.suffix == ".safetensors":
        source = _from_safetensors(path)
    else:
        return RawCheckpoint(str(path), _state_dict(path, read_torch_file(path), ema=ema))
    if ema:
        raise InputError(f"{path}: no moving average here; expected a training checkpoint (.pth)")
    return source


def _state_dict(path: epath.Path, content: Any, *, ema: bool) -> dict[str, np.ndarray]:
    wanted = _EMA if ema else _PLAIN
    if isinstance(content, dict):
        found = [content[key] for key in wanted if isinstance(content.get(key), dict)]
        if found:
            content = found[0]
        elif ema:
            raise InputError(f"{path}: expected {' or '.join(_EMA)}; got {_some(content)}")
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected named tensors; got {type(content).__name__}")
    others = [key for key, value in content.items() if not isinstance(value, np.ndarray)]
    if others or not all(isinstance(key, str) for key in content):
        raise InputError(
            f"{path}: expected named tensors, or {' or '.join(_PLAIN)} with them; got "
            f"{_some(content)}"
        )
    return content


def _some(names: Any, most: int = 8) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if listed[most:] else "")


def _from_safetensors(path: epath.Path) -> RawCheckpoint:
    try:
        arrays = load_file(path)
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a readable .safetensors (truncated?): {error}") from error
    if metadata is None or METADATA not in metadata:
        return RawCheckpoint(str(path), arrays)
    return _described(path, arrays, _parse(path, metadata[METADATA]))


def _from_orbax(path: epath.Path) -> RawCheckpoint:
    config, params = load_model(path)
    if "params" not in params:
        raise InputError(f"{path}: expected a tree with 'params'; got {_some(params)}")
    ours = traverse_util.flatten_dict(params["params"], sep="/")
    arrays = to_theirs(Naming("timm"), {name: np.asarray(array) for name, array in ours.items()})
    return _described(path, arrays, config)


def _described(
    path: epath.Path, arrays: dict[str, np.ndarray], config: dict[str, Any]
) -> RawCheckpoint:
    """Takes from keyword arguments of `create_model` what the arrays do not tell."""
    reducer = {k: v for k, v in config.items() if k in ("reducer", "keep_rate", "layers")}
    own = {k: v for k, v in config.items() if k not in reducer}
    try:
        model = create_model(**own)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: it describes no model of ours: {error}") from error
    return RawCheckpoint(
        str(path),
        arrays,
        image_size=model.image_size,
        num_heads=model.num_heads,
        layer_norm_eps=model.layer_norm_eps,
        reducer=reducer,
    )


def _from_hugging_face(path: epath.Path) -> RawCheckpoint:
    files = [path / name for name in _HF_WEIGHTS if (path / name).is_file()]
    if not (path / "config.json").is_file() or not files:
        raise InputError(
            f"{path}: no checkpoint in this folder; expected config.json with "
            f"{' or '.join(_HF_WEIGHTS)}, or what tdm_jax wrote; got "
            f"{_some(entry.name for entry in path.iterdir()) or 'nothing'}"
        )
    try:
        text = (path / "config.json").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}/config.json: not readable: {error}") from error
    config = _parse(path / "config.json", text)
    for key, expected in (("model_type", ("vit", "deit")), ("hidden_act", ("gelu",))):
        if key not in config or config[key] not in expected:
            got = repr(config[key]) if key in config else "nothing"
            raise InputError(
                f"{path}/config.json: expected {key} {' or '.join(map(repr, expected))}; got {got}"
            )
    weights = _from_safetensors(files[0]) if files[0].suffix == ".safetensors" else None
    arrays = weights.arrays if weights else _state_dict(path, read_torch_file(files[0]), ema=False)
    if "qkv_bias" in config and not config["qkv_bias"]:
        arrays = _with_zero_biases(arrays)
    known: dict[str, Any] = {}
    if "image_size" in config:
        known["image_size"] = _pair(path, config["image_size"])
    if "num_attention_heads" in config:
        known["num_heads"] = _number(path, config, "num_attention_heads", int)
    if "layer_norm_eps" in config:
        known["layer_norm_eps"] = _number(path, config, "layer_norm_eps", float)
    if isinstance(config.get("id2label"), dict):
        known["num_classes"] = len(config["id2label"])
    elif "num_labels" in config:
        known["num_classes"] = _number(path, config, "num_labels", int)
    return RawCheckpoint(str(path), arrays, **known)


def _with_zero_biases(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # qkv_bias=False: there are none in the file, which is the same as zeros.
    pattern = re.compile(r"attention\.(attention\.(query|key|value)|[qkv]_proj)\.weight$")
    zeros = {
        name.removesuffix("weight") + "bias": np.zeros(array.shape[:1], array.dtype)
        for name, array in arrays.items()
        if pattern.search(name)
    }
    return {**zeros, **arrays}


def _parse(path: epath.Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; got {type(value).__name__}")
    return value


def _number(path: epath.Path, config: dict[str, Any], name: str, kind: type) -> Any:
    value = config[name]
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{path}: expected a positive {kind.__name__} for {name}; got {value!r}")
    return value


def _pair(path: epath.Path, size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(f"{path}: expected image_size as one or two numbers; got {size!r}")
    return pair
