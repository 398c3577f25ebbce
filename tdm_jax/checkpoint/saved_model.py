"""A model in a folder of its own: its description and its variables, as Orbax writes them."""

import json
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from tdm_jax.checkpoint.integrity import check, checksums, read_tree
from tdm_jax.errors import InputError, summary
from tdm_jax.parallel.distributed import on_one_process

PyTree = Any
_VARIABLES, _MODEL = "params", "model"  # the items of the folder
_CHECKSUMS = "checksums"  # of the former, in the latter


def is_saved_model(path: str | PathLike[str]) -> bool:
    """Whether `save_model` wrote this folder."""
    folder = epath.Path(path)
    return (folder / _VARIABLES).is_dir() and (folder / _MODEL).is_dir()


def save_model(
    path: str | PathLike[str],
    description: dict[str, Any],
    variables: PyTree,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model's description and variables into a folder of its own.

    Args:
      path: the folder; it must not exist unless `overwrite`.
      description: keyword arguments of `create_model` as JSON can hold them, see `describe`.
      variables: what `model.init` returned.
      overwrite: replace a folder that exists, once the new one is complete.

    Raises:
      InputError: the folder exists, or cannot be written.
    """
    folder = epath.Path(path).absolute()
    if folder.exists() and not (overwrite and is_saved_model(folder)):
        hint = "not a saved model, so it stays" if overwrite else "--overwrite would replace it"
        raise InputError(f"{path} exists ({hint}); expected a new name")
    target = folder.with_name(f"{folder.name}.new") if folder.exists() else folder
    content = {**description, _CHECKSUMS: checksums(variables)}
    items = {_VARIABLES: ocp.args.PyTreeSave(variables), _MODEL: ocp.args.JsonSave(content)}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(target, ocp.args.Composite(**items), force=target != folder)
    except OSError as error:
        raise InputError(f"cannot write {path}: {summary(error)}") from error
    if target != folder:
        on_one_process("save_model", lambda: _replace(target, folder))


def _replace(new: epath.Path, folder: epath.Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    folder.rename(old)
    new.rename(folder)
    old.rmtree()


def load_model(path: str | PathLike[str]) -> tuple[dict[str, Any], PyTree]:
    """Reads what `save_model` wrote, on any number of devices.

    Returns:
      The keyword arguments of `create_model`, and the variables on the default device.

    Raises:
      InputError: the folder is missing, not a saved model, or damaged.
    """
    folder = epath.Path(path).absolute()
    if not is_saved_model(folder):
        raise InputError(f"{path}: no model here; expected a folder that tdm_jax wrote")
    try:
        # Where Orbax writes the JSON of an item.
        description = json.loads((folder / _MODEL / "metadata").read_text())
        variables = read_tree(folder / _VARIABLES)
        check(variables, description.pop(_CHECKSUMS, {}))
    except Exception as error:  # each damaged file fails in its own way
        raise InputError(f"{path}: not readable (damaged?): {summary(error)}") from error
    return description, jax.tree.map(jnp.asarray, variables)
