import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.reduction import Reducer, make_reducer
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import (
    initial_variables,
    load_teacher,
    make_experiment,
    reducer_of,
)


def settings_of(**changes):
    config = default_config(name="digits")
    sizes = {"patch_size": 14, "width": 16, "depth": 2, "num_heads": 2}
    config.model = ConfigDict({"name": "vit", **sizes})
    config.reducer.layers = (1,)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return parse(config)


def make(**changes):
    return make_experiment(settings_of(**changes), dataset=(320, 10))


def test_a_model_says_how_its_data_are_prepared():
    model = make(**{"data.mean": (0.5,), "data.interpolation": "nearest"}).model
    assert model.preprocessing == Preprocessing((0.5,), (0.349,), 1.0, "nearest")
    assert (model.image_size, model.in_channels, model.num_classes) == ((28, 28), 1, 10)
    assert make(**{"model.image_size": 28}).model.image_size == (28, 28)


def test_none_is_the_methods_own_default():
    assert reducer_of({"name": "tdm", "keep_rate": None, "layers": None}) == make_reducer("tdm")
    assert reducer_of({"name": "none", "keep_rate": 0.5, "layers": (1,)}) == Reducer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_classes": 7}, r"model.num_classes is 7, but the data \(digits\) have 10"),
        ({"model.image_size": 32}, r"model.image_size is \(32, 32\), but the data .* \(28, 28\)"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16'"),
        ({"reducer.name": "avit", "reducer.preset": "x"}, "unknown setting of reducer 'avit'"),
    ],
)
def test_what_does_not_fit_together(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_what_happens_every_so_many_epochs():
    run = make(epochs=3.0, **{"optim.warmup_epochs": 0.0})  # ten steps each
    assert run.steps == 30
    assert [step for step in range(1, 31) if run.due(step, 1.0)] == [10, 20, 30]
    assert [step for step in range(1, 31) if run.due(step, 0.75)] == [8, 15, 23, 30]
    assert [step for step in range(1, 31) if run.due(step, 0.0)] == [30]


@pytest.fixture
def checkpoint(tmp_path):
    """A model with TDM, as a training leaves it in its working directory."""
    model = make(**{"reducer.name": "tdm", "reducer.keep_rate": 0.5}).model
    variables = model.init(jax.random.key(1), jnp.zeros((1, 28, 28, 1)))
    save_model(tmp_path / "model", describe(model), variables)
    return tmp_path, variables


@pytest.mark.slow
def test_a_working_directory_teaches_as_the_method_wants_it(checkpoint):
    path, variables = checkpoint
    assert load_teacher(settings_of()) == (None, None)
    for teacher in (str(path), "init_from"):
        settings = settings_of(
            init_from=str(path), **{"distill.kind": "soft", "distill.teacher": teacher}
        )
        model, loaded = load_teacher(settings)
        assert model.reducer == Reducer()
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    settings = dataclasses.replace(settings, reducer={"name": "tocom"})
    assert load_teacher(settings)[0].reducer == make_reducer("tocom").of_teacher() != Reducer()


def test_a_working_directory_is_started_from_with_the_runs_own_reducer(checkpoint):
    path, variables = checkpoint
    settings = settings_of(init_from=str(path), **{"data.mean": (0.5,)})
    model = make_experiment(settings, dataset=(320, 10)).model
    loaded = initial_variables(settings, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    deeper = dataclasses.replace(settings, model={**settings.model, "depth": 3})
    with pytest.raises(InputError, match="is another model: got depth 2, expected 3"):
        initial_variables(deeper, make_experiment(deeper, dataset=(320, 10)).model)


def test_the_transformer_may_be_that_of_the_checkpoint(checkpoint):
    path, variables = checkpoint
    config = default_config(name="digits")
    config.model.name = "init_from"
    config.model.drop_path = 0.1
    with pytest.raises(InputError, match="model.name is 'init_from', but init_from is empty"):
        make_experiment(parse(config), dataset=(320, 10))
    config.init_from = str(path)
    config.reducer.name = "topk"
    settings = parse(config)
    model = make_experiment(settings, dataset=(320, 10)).model
    own = make(**{"model.drop_path": 0.1, "reducer.name": "topk", "reducer.layers": None}).model
    assert describe(model) == describe(own)
    loaded = initial_variables(settings, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
