"""Weights of learned methods: what is missing, or does not fit, is named before anything runs."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from tdm_jax.checkpoint import load_pretrained
from tdm_jax.errors import InputError
from tdm_jax.reduction import REDUCERS, ViTShape, list_reducers, make_reducer
from tdm_jax.reduction.original_weights import import_stages

GOLDENS = Path(__file__).parents[1] / "goldens"
SHAPE = ViTShape((8, 8), 12, 48, 3)

LEARNED = [name for name, kind in REDUCERS.items() if kind.learned]
LEARNED += [f"{name}+tdm" for name in LEARNED if f"{name}+tdm" in list_reducers()]
# What the arrays of a stage are called.
PREFIXES = {
    "dyvit": "score_predictor",
    "spvit": "score_predictor",
    "iared2": "interpreter",
    "sinkhorn": "cluster_layers",
    "patchmerger": "cluster_layers",
    "sit": "cluster_layers",
}


def load(name, **options):
    path = GOLDENS / "timm_deit.safetensors"
    return load_pretrained(path, reducer_of(name), num_heads=3, **options)


def reducer_of(name):
    return make_reducer(name, **({} if name == "tocom" else {"keep_rate": 0.7}))


def test_stages_are_sorted_and_kernels_turned():
    arrays = {"s.1.a.weight": np.arange(6).reshape(2, 3), "s.0.a.weight": np.zeros((2, 3))}
    reducer = make_reducer("dyvit", layers=(1, 2))
    tree = import_stages(reducer, arrays, "s", {"a.weight": "a/kernel"})
    assert list(tree) == ["stage_0", "stage_1"]
    np.testing.assert_array_equal(tree["stage_1"]["a"]["kernel"], [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(InputError, match=r"1 missing: s\.0\.b; 1 unknown: s\.0\.a"):
        import_stages(make_reducer("dyvit", layers=(1,)), {"s.0.a": np.zeros(1)}, "s", {"b": "b"})


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("stages", [0, 2, 4])
def test_a_wrong_number_of_stages_is_refused(name, stages):
    arrays = {f"{PREFIXES[name]}.{stage}.v": np.zeros(1) for stage in range(stages)}
    expected = r"expected weights of 3 stages, one for each of layers='\w+', named "
    with pytest.raises(InputError, match=rf"{expected}{PREFIXES[name]}\.0.*; got {stages} stages"):
        make_reducer(name).import_weights(arrays)


@pytest.mark.parametrize("name", LEARNED)
def test_without_its_weights_a_learned_method_names_them(name):
    reducer = reducer_of(name)
    with pytest.raises(InputError) as error:
        load(name)
    message = str(error.value)
    assert f"{reducer.title} is learned: expected its weights as extra_weights" in message
    tree = jax.eval_shape(lambda key: reducer.init(key, SHAPE), jax.random.key(0))
    stages = f"stage_0-{len(tree) - 1}" if len(tree) > 1 else "stage_0"
    # A long list is cut short.
    listed = message.split("missing: ")[1].split(" and ")[0].split("; ")[0].split(", ")
    paths = traverse_util.flatten_dict(tree["stage_0"], sep="/")
    assert {f"reducer/{stages}/{path}" for path in paths}.issuperset(listed)


@pytest.mark.parametrize("name", ["dyvit", "sinkhorn", "patchmerger", "sit"])
def test_weights_of_another_width_are_refused(golden, name):
    arrays = {k[2:]: v for k, v in golden(f"{name}_keep0.7").items() if k.startswith("w:")}
    wider = {k: np.concatenate([v, v], axis=-1) for k, v in arrays.items()}
    with pytest.raises(
        InputError, match=r"misshapen: reducer/stage_0\S* float32\[.*96.*\], expected \["
    ):
        load(name, extra_weights=wider)


def test_a_scorer_of_another_width_is_refused():
    arrays = {"gumbel.weight": np.zeros((1, 20)), "gumbel.bias": np.zeros(1)}
    with pytest.raises(
        InputError, match=r"reducer/stage_0/kernel float64\[20, 1\], expected \[48, 1\]"
    ):
        load("svite", extra_weights=arrays)
