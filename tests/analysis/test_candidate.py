"""Who takes part: names, settings, checkpoints, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.analysis.candidate import (
    Candidate,
    make_candidate,
    make_candidates,
    parse_method,
    with_baselines,
)
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.reduction import REDUCERS, StageReducer, make_reducer

SIZES = {"image_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10}
DEIT = "deit_tiny_patch16_224"


@pytest.fixture
def plain(tiny_model):
    return Candidate("tiny", "none", None, *tiny_model(**SIZES))


@pytest.fixture
def saved(plain, tmp_path):
    save_model(tmp_path / "tiny", describe(plain.model), plain.variables)
    return str(tmp_path / "tiny")


def test_a_baseline_is_added_first_and_only_where_there_is_none(plain, tiny_model):
    reduced = Candidate("tiny", "topk", 0.5, *tiny_model("topk", 0.5, layers=(1,), **SIZES))
    first, second = with_baselines([reduced])
    assert first.is_baseline
    assert first.variables["params"].keys() == plain.variables["params"].keys()
    assert second is reduced
    assert with_baselines([reduced, plain]) == [plain, reduced]


def test_models_are_grouped():
    tiny, small = (f"deit_{size}_patch16_224" for size in ("tiny", "small"))
    candidates = [
        make_candidate(name, "topk", rate) for rate in (0.7, 0.5) for name in (tiny, small)
    ]
    labels = [(candidate.name, candidate.label) for candidate in with_baselines(candidates)]
    own = ["none", "topk 0.7", "topk 0.5"]
    assert labels == [(tiny, label) for label in own] + [(small, label) for label in own]


def test_every_method_runs_at_every_rate_and_what_has_none_once():
    candidates = make_candidates(
        [DEIT], ["none", "topk"], [0.7, 0.5], [(DEIT, "evit", 0.3)], layers=[1]
    )
    assert [candidate.label for candidate in candidates] == [
        *("none", "topk 0.7", "topk 0.5", "evit 0.3")
    ]
    assert candidates[-1].model.reducer.schedule.layers == (1,)


def test_methods_with_settings():
    assert parse_method("tdm/preset=published/neighbors=5/fuse=True") == (
        "tdm",
        {"preset": "published", "neighbors": 5, "fuse": True},
    )
    candidate = make_candidate(DEIT, "topk/r=20", 0.7)
    assert candidate.keep_rate is None
    assert candidate.model.schedule[-1].out == 196 - 60


def test_a_keep_rate_and_layers_are_for_methods_with_stages():
    for method, reducer in REDUCERS.items():
        candidate = make_candidate(DEIT, method, 0.5, layers=(3,))
        staged = isinstance(reducer, StageReducer)
        assert candidate.keep_rate == (0.5 if staged else None)
        assert not staged or candidate.model.reducer.schedule.layers == (3,)


def test_a_checkpoint_is_read_once_for_all_methods(saved, plain):
    loaded = {}
    candidates = [
        make_candidate(saved, method, 0.5, layers=(1,), loaded=loaded)
        for method in ("topk", "evit")
    ]
    assert len(loaded) == 1
    assert candidates[0].variables is candidates[1].variables
    images = jnp.ones((1, 28, 28, 1))
    read, made = (
        jax.jit(candidate.model.apply)(candidate.variables, images)
        for candidate in (candidates[0].unreduced(), plain)
    )
    np.testing.assert_array_equal(read, made)


def test_without_a_method_it_is_the_saved_one_at_any_keep_rate(tiny_model, tmp_path):
    model, variables = tiny_model("topk", 0.75, layers=(1,), **SIZES)
    save_model(tmp_path / "model", describe(model), variables)
    own = make_candidate(str(tmp_path / "model"), None)
    assert (own.method, own.keep_rate, own.model.reducer) == ("topk", 0.75, model.reducer)
    other = make_candidate(str(tmp_path / "model"), None, 0.5, layers=(2,))
    assert other.model.reducer == make_reducer("topk", keep_rate=0.5, layers=(2,))


@pytest.mark.parametrize("name", ["dyvit", "sinkhorn"])
def test_a_learned_method_without_weights_is_one_line(name, saved):
    with pytest.raises(InputError, match="reducer"):
        make_candidate(saved, name, 0.5, layers=(1,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: make_candidate("deit_smal_patch16_224"), "deit_smal_patch16_224"),
        (lambda: make_candidate(DEIT, "tdn"), "unknown reducer 'tdn'"),
        (lambda: make_candidate(DEIT, "tdm/published"), "name/key=value"),
        (lambda: make_candidate(DEIT, "tdm", 1.5), r"\(0, 1\]"),
        (lambda: with_baselines([]), "nothing to compare"),
        (lambda: make_candidates(), "no model given"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
