"""A training's working directory: what lies where, and whose it is.

It may be a folder, or a place in an object store (gs://bucket/run; needs `pip install gcsfs`).
"""

import dataclasses
import json
from os import PathLike, fspath
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from tdm_jax import parsing
from tdm_jax.checkpoint import describe
from tdm_jax.checkpoint.workdir import CHECKPOINTS, DESCRIPTION
from tdm_jax.errors import InputError
from tdm_jax.files import is_remote, reach, read_json, write_text
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.training.config import Settings, parse

CONFIG, RESULT = "config.json", "result.json"
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
    local = {"tensorboard": settings.tensorboard, "profile_steps": settings.profile_steps}
    if is_remote(workdir) and any(local.values()):
        asked = " and ".join(name for name, value in local.items() if value)
        raise InputError(f"{asked} can only write to a local folder, expected one; got {workdir}")
    return reach(workdir)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a whole text file, or leaves what was there."""
    if is_remote(path):
        path.write_text(text)  # A store shows an object once it is complete.
    else:
        write_text(fspath(path), text)


def check_same_run(workdir: epath.Path, settings: Settings) -> None:
    """Raises InputError if `workdir` has checkpoints of a run of other settings."""
    stored = settings_of(workdir)
    if stored is None or not any((workdir / CHECKPOINTS).iterdir()):
        return
    there, here = _comparable(stored), _comparable(settings)
    changed = [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(_FREE)
    ]
    if changed:
        raise InputError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed[:5])}; "
            "expected the same one, or a new workdir"
        )


def write_start(workdir: epath.Path, settings: Settings, model: VisionTransformer) -> None:
    """Marks `workdir` as this run's, and says of what model its checkpoints are."""
    _write_json(workdir / CONFIG, dataclasses.asdict(settings))
    _write_json(workdir / DESCRIPTION, describe(model))


def read_result(workdir: epath.Path) -> dict[str, float] | None:
    """What a finished run achieved; None if it is not finished."""
    path = workdir / RESULT
    return read_json(path) if path.exists() else None


def write_result(workdir: epath.Path, result: dict[str, float]) -> None:
    """Marks the run as finished."""
    _write_json(workdir / RESULT, result)


def settings_of(workdir: str | PathLike[str]) -> Settings | None:
    """The settings of the training that `workdir` belongs to; None if it belongs to none.

    What an older version did not know has its default of today.
    """
    path = epath.Path(workdir) / CONFIG
    if not (path.is_file() and (path.parent / CHECKPOINTS).is_dir()):
        return None
    values, strange = parsing.known(Settings, read_json(path))
    if strange:
        logging.warning("%s: passed over what this version does not know: %s", path, strange)
    # Older versions wrote a keep rate of 0 and no layers for the method's own.
    values["reducer"] = {
        name: value
        for name, value in values.get("reducer", {}).items()
        if (name, value) not in (("keep_rate", 0), ("layers", []))
    }
    return parse(ConfigDict(values))


def _comparable(settings: Settings) -> dict[str, Any]:
    """Every setting by its whole key, as JSON holds it; whether a default was written is lost."""
    defaults = {field.name: field.default for field in dataclasses.fields(VisionTransformer)}
    tree = dataclasses.asdict(settings) | {
        "model": defaults | {"dtype": "float32"} | settings.model,
        "reducer": {name: value for name, value in settings.reducer.items() if value is not None},
    }
    return _flat(json.loads(json.dumps(tree, default=str)))


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(path, json.dumps(content, indent=2) + "\n")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
