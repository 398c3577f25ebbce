"""A model in a folder of its own: its description and its parameters, as Orbax writes them."""

from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tdm_jax.checkpoint.integrity import check, checksums, summary, verify
from tdm_jax.errors import InputError
from tdm_jax.parallel.distributed import on_one_process

PyTree = Any
_PARAMS, _MODEL = "params", "model"  # the items of the folder
_CHECKSUMS = "checksums"  # of the former, in the latter


def is_saved_model(path: str | PathLike[str]) -> bool:
    """Whether `save_model` wrote this folder."""
    folder = epath.Path(path)
    return (folder / _PARAMS).is_dir() and (folder / _MODEL).is_dir()


def save_model(
    path: str | PathLike[str],
    model_config: dict[str, Any],
    params: PyTree,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model's description and parameters into a folder of its own.

    Args:
      path: the folder; it must not exist unless `overwrite`.
      model_config: keyword arguments of `create_model`, as JSON can hold them.
      params: what `model.init` returned.
      overwrite: replace a folder that exists, once the new one is complete.

    Raises:
      InputError: the folder exists, or cannot be written.
    """
    folder = epath.Path(path).absolute()
    if folder.exists() and not (overwrite and is_saved_model(folder)):
        hint = "not a saved model, so it stays" if overwrite else "--overwrite would replace it"
        raise InputError(f"{path} exists ({hint}); expected a new name")
    target = folder.with_name(f"{folder.name}.new") if folder.exists() else folder
    description = {**model_config, _CHECKSUMS: checksums(params)}
    items = {_PARAMS: ocp.args.PyTreeSave(params), _MODEL: ocp.args.JsonSave(description)}
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
      The keyword arguments of `create_model`, and the parameters on the default device.

    Raises:
      InputError: the folder is missing, not a saved model, or damaged.
    """
    folder = epath.Path(path).absolute()
    if not is_saved_model(folder):
        raise InputError(f"{path}: no model here; expected a folder that tdm_jax wrote")
    try:
        verify(folder / _PARAMS)
        config, params = _read_model(folder)
        check(params, config.pop(_CHECKSUMS, {}))
    except Exception as error:  # each damaged file fails in its own way
        raise InputError(f"{path}: not readable (damaged?): {summary(error)}") from error
    return config, jax.tree.map(jnp.asarray, params)


def _read_model(folder: epath.Path) -> tuple[dict[str, Any], PyTree]:
    handler = ocp.CompositeCheckpointHandler(
        **{_PARAMS: ocp.PyTreeCheckpointHandler(), _MODEL: ocp.JsonCheckpointHandler()}
    )
    with ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata[_PARAMS].tree
        # As NumPy arrays: the devices that wrote them need not exist here.
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        items = {
            _PARAMS: ocp.args.PyTreeRestore(restore_args=to_numpy),
            _MODEL: ocp.args.JsonRestore(),
        }
        restored = checkpointer.restore(folder, ocp.args.Composite(**items))
    return restored[_MODEL], restored[_PARAMS]
