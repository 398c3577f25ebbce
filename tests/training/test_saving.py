import contextlib

import jax
import numpy as np
import pytest
from etils import epath
from flax import struct
from jaxtyping import PyTree
from ml_collections import ConfigDict

from tdm_jax.checkpoint import Store, load_pretrained
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.parallel.sharding import MeshConfig, make_mesh
from tdm_jax.reduction import make_reducer
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import make_experiment
from tdm_jax.training.saving import first_state, restore, save_models, to_disk
from tdm_jax.training.workdir import write_start


def make(**changes):
    config = default_config(name="digits")
    sizes = {"patch_size": 14, "width": 16, "depth": 2, "num_heads": 2}
    config.model = ConfigDict({"name": "vit", **sizes})
    config.reducer.layers = (1,)
    config.optim.ema_decay = 0.5
    config.update_from_flattened_dict(changes)
    return make_experiment(parse(config), dataset=(1000, 10))


@struct.dataclass
class OldState:
    """As the state was called when its first checkpoints were written."""

    step: PyTree
    params: PyTree
    opt_state: PyTree
    ema: PyTree


@pytest.mark.parametrize("old", [True, False])
def test_states_keep_the_names_that_they_have_on_disk(tmp_path, old):
    experiment, mesh = make(), make_mesh(MeshConfig(fsdp=2))
    state = first_state(experiment, mesh)
    with contextlib.closing(Store(tmp_path)) as store:
        assert restore(store, experiment, mesh) is None
        store.save(3, OldState(**to_disk(state)) if old else to_disk(state))
        restored = restore(store, experiment, mesh)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    places = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (restored, state)]
    assert places[0] == places[1]


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_gives_the_method_back_that_it_trains(tmp_path, finished):
    """From its last checkpoint as long as it goes on, then from what it leaves."""
    experiment = make(**{"reducer.name": "tdm", "reducer.keep_rate": 0.5})
    mesh = make_mesh(MeshConfig())
    state = first_state(experiment, mesh)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    write_start(epath.Path(tmp_path), experiment.settings, experiment.model)
    if finished:
        save_models(epath.Path(tmp_path), experiment, mesh, state)
    else:
        with contextlib.closing(Store(tmp_path / "checkpoints")) as store:
            store.save(1, to_disk(state))
    for ema, expected in ((False, state.variables), (True, state.ema)):
        model, variables = load_pretrained(tmp_path, ema=ema)
        assert model.reducer == make_reducer("tdm", keep_rate=0.5, layers=(1,))
        assert model.preprocessing == Preprocessing((0.309,), (0.349,), 1.0, "bicubic")
        jax.tree.map(np.testing.assert_array_equal, variables, expected)
