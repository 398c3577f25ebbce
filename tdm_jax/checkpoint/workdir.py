"""Where a training puts what can be loaded: models at its end, before it the states of steps."""

import contextlib
from typing import Any

from etils import epath

from tdm_jax.checkpoint.saved_model import is_saved_model, load_model
from tdm_jax.checkpoint.store import Store
from tdm_jax.errors import InputError
from tdm_jax.files import read_json

CHECKPOINTS, DESCRIPTION = "checkpoints", "model.json"
MODEL, MODEL_EMA = "model", "model_ema"


def is_workdir(path: epath.Path) -> bool:
    """Whether a training left anything here that could be loaded."""
    return is_saved_model(path / MODEL) or (path / CHECKPOINTS).is_dir()


def load_workdir(path: epath.Path, *, ema: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a training has come to: its result, else its newest readable checkpoint.

    Args:
      path: the working directory; the training may still be going on.
      ema: take the averaged weights.

    Returns:
      The model's description, and its variables.

    Raises:
      InputError: nothing was saved yet, or no averaged weights, or all of it is damaged.
    """
    result = path / (MODEL_EMA if ema else MODEL)
    if is_saved_model(result):
        return load_model(result)
    newest = None
    if (path / CHECKPOINTS).is_dir():
        with contextlib.closing(Store(path / CHECKPOINTS, read_only=True)) as store:
            newest = store.restore_branch("ema" if ema else "params")
    if newest is not None and not newest[1]:
        raise InputError(f"{path} keeps no averaged weights (optim.ema_decay is 0)")
    if newest is None:
        raise InputError(f"{path} has no checkpoint yet")
    if not (path / DESCRIPTION).is_file():
        raise InputError(
            f"{path} does not say of what model its checkpoints are: no {DESCRIPTION}, which older "
            "versions did not write; expected that tdm_jax.train continues it once"
        )
    return read_json(path / DESCRIPTION), newest[1]
