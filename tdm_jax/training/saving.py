"""What a run keeps on disk of its arrays: states to go on from, and at its end the models."""

import functools

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from tdm_jax.checkpoint import Store, describe, save_model
from tdm_jax.checkpoint.workdir import MODEL, MODEL_EMA
from tdm_jax.parallel import sharding
from tdm_jax.training.experiment import Experiment, initial_variables
from tdm_jax.training.step import TrainState, init_state


def to_disk(state: TrainState) -> dict[str, PyTree]:
    """A state by the names that it has on disk, where `variables` are `params`."""
    return {
        "step": state.step,
        "params": state.variables,
        "opt_state": state.opt_state,
        "ema": state.ema,
    }


def restore(store: Store, experiment: Experiment, mesh: Mesh) -> TrainState | None:
    """The newest readable state, spread over a mesh; None if nothing was saved yet."""
    abstract = experiment.abstract_state()
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        sharding.state_shardings(mesh, abstract),
    )
    restored = store.restore(to_disk(abstract))
    if restored is None:
        return None
    tree = restored[1]
    return TrainState(tree["step"], tree["params"], tree["opt_state"], tree["ema"])


def first_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state before the first step: from a checkpoint if the settings name one."""
    shardings = sharding.state_shardings(mesh, experiment.abstract_state())
    placed = functools.partial(jax.jit, out_shardings=shardings)
    if not experiment.settings.init_from:
        return placed(experiment.random_state)()
    variables = initial_variables(experiment.settings, experiment.model)
    return placed(functools.partial(init_state, experiment.recipe))(variables)


def save_models(workdir: epath.Path, experiment: Experiment, mesh: Mesh, state: TrainState) -> None:
    """Writes the trained weights, and their average if there is one, for `load_pretrained`."""
    gathered = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    trees = {MODEL: state.variables}
    if experiment.recipe.ema_decay > 0.0:
        trees[MODEL_EMA] = state.ema
    for name, tree in trees.items():
        save_model(workdir / name, describe(experiment.model), gathered(tree), overwrite=True)
