"""A training's working directory: what lies where, and whose it is.

It may be a folder, or a place in an object store (gs://bucket/run; needs `pip install gcsfs`).
"""

import json
from os import PathLike, fspath
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from tdm_jax.checkpoint.integrity import summary
from tdm_jax.checkpoint.saved_model import is_saved_model
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.training.config import Settings, parse

CONFIG, RESULT, CHECKPOINTS = "config.json", "result.json", "checkpoints"
MODEL, MODEL_EMA = "model", "model_ema"
# What may change when a run is continued: where and how it runs, not what it computes.
_FREE = (
    "mesh.",
    "eval.",
    "checkpoint.",
    "log_every",
    "tensorboard",
    "profile_steps",
    "data.data_dir",
    "data.threads",
    "data.workers",
    "data.max_corrupt",
    "data.eval_batch_size",
)


def open_workdir(workdir: str | PathLike[str], settings: Settings) -> epath.Path:
    """Where a run works; it need not exist.

    Raises:
      InputError: it cannot be reached, or what the settings ask for cannot be written there.
    """
    path = epath.Path(workdir)
    if not _is_remote(path):
        return path
    local = {"tensorboard": settings.tensorboard, "profile_steps": settings.profile_steps}
    if any(local.values()):
        asked = " and ".join(name for name, value in local.items() if value)
        raise InputError(f"{asked} can only write to a local folder, expected one; got {path}")
    try:
        path.exists()
    except Exception as error:  # each kind of store fails in its own way
        raise InputError(
            f"cannot reach {path}: {summary(error)}; expected `pip install gcsfs` and credentials"
        ) from error
    return path


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a whole text file, or leaves what was there."""
    if _is_remote(path):
        path.write_text(text)  # A store shows an object once it is complete.
    else:
        write_text(fspath(path), text)


def append(path: epath.Path, text: str) -> None:
    """Adds to a text file, or makes one."""
    if _is_remote(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def _is_remote(path: epath.Path) -> bool:
    return "://" in fspath(path)


def check_same_run(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises InputError if `workdir` has checkpoints of a run of another configuration."""
    path = workdir / CONFIG
    checkpoints = workdir / CHECKPOINTS
    if not path.exists() or not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        return
    theirs, mine = _flat(_read(path)), _flat(_plain(config))
    changed = [
        f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here"
        for key in sorted(theirs.keys() | mine.keys())
        if theirs.get(key) != mine.get(key) and not key.startswith(_FREE)
    ]
    if changed:
        raise InputError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed[:5])}; "
            "expected the same one, or a new workdir"
        )


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Marks `workdir` as this run's."""
    if jax.process_index() == 0:
        write_whole(workdir / CONFIG, json.dumps(_plain(config), indent=2) + "\n")


def read_result(workdir: epath.Path) -> dict[str, float] | None:
    """What a finished run achieved; None if it is not finished."""
    path = workdir / RESULT
    return _read(path) if path.exists() else None


def write_result(workdir: epath.Path, result: dict[str, float]) -> None:
    """Marks the run as finished."""
    if jax.process_index() == 0:
        write_whole(workdir / RESULT, json.dumps(result, indent=2) + "\n")


def settings_of(workdir: str | PathLike[str]) -> Settings | None:
    """The settings of the training that `workdir` belongs to; None if it belongs to none."""
    path = epath.Path(workdir) / CONFIG
    if not (path.is_file() and (path.parent / CHECKPOINTS).is_dir()):
        return None
    return parse(ConfigDict(_read(path)))


def trained_model(path: str | PathLike[str]) -> epath.Path:
    """Where the weights lie: in `model/` of a training's working directory, else at `path`."""
    inside = epath.Path(path) / MODEL
    return inside if is_saved_model(inside) else epath.Path(path)


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable: {error}") from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
