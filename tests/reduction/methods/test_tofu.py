"""ToFu: equal to its original, what becomes of norms, and the slope of its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.ops.merging import Merge
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.averages import largest
from tdm_jax.reduction.schedules import inflected, removals
from tdm_jax.reduction.token_state import TokenState

GOLDENS = {
    "r3": {"r": 3},
    "r5": {"r": 5},
    "decreasing38": {"r": inflected(3, -0.5, 12, total=38)},
    "all_tofu_r4": {"r": 4, "strategy": "tofu"},
    "all_prune_r4": {"r": 4, "strategy": "prune"},
    "all_mean_r4": {"r": 4, "strategy": "mean"},
}
# Both halves of the published strategy; the others take a compilation each.
QUICK = {"decreasing38"}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GOLDENS]


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_original(answer, golden, name):
    expected = golden(f"tofu_{name}")
    removed = np.broadcast_to(expected["r"], 12)
    settings = GOLDENS[name]
    assert removed.tolist() == np.broadcast_to(settings["r"], 12).tolist()
    logits, info = answer(make_reducer("tofu", **settings))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    # The original books a dropped token on its partner; here its patches are on no token.
    assign, booked = np.asarray(info.assign), expected["source"][:, 1:, 1:].argmax(axis=1)
    np.testing.assert_array_equal(assign[assign >= 0], booked[assign >= 0])
    pruning = {"prune": 12, "prune-tofu": 7}.get(settings.get("strategy", "prune-tofu"), 0)
    assert ((assign < 0).sum(axis=1) == removed[:pruning].sum()).all()


def stage(strategy, tokens, keys, layer=0):
    shape = ViTShape((1, tokens.shape[1]), 4, tokens.shape[2], 1, 0, class_token=False)
    state = TokenState.start(jnp.zeros((1, 0, tokens.shape[2])), tokens)
    view = AttentionView(keys, keys, keys, keys[:, 0], None, 0)
    context = BlockContext(layer=layer, shape=shape, train=False, weights={}, attention=view)
    return make_reducer("tofu", r=1, strategy=strategy).reduce(state, context)


# Token 0 and 1 are alike and merge into 1; 2 and 3 stay.
TOKENS = jnp.array([[[6.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 4.0]]])
KEYS = jnp.array([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.4], [0.0, -1.0]]])[:, :, None]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("prune", [0.0, 2.0]),
        ("mean", [3.0, 1.0]),
        ("tofu", [9.0, 3.0]),  # (3, 1) times 6 / 2
        ("mlerp", [6 * 3 / 10**0.5, 6 / 10**0.5]),
    ],
)
def test_what_two_tokens_become(strategy, expected):
    after = stage(strategy, TOKENS, KEYS)
    np.testing.assert_allclose(after.tokens[0], [TOKENS[0, 2], expected, TOKENS[0, 3]], rtol=1e-6)
    np.testing.assert_array_equal(after.size[0], [1, 1 if strategy == "prune" else 2, 1])
    assert after.assign.tolist() == [[-1 if strategy == "prune" else 1, 1, 0, 2]]


def test_it_prunes_until_half_of_the_blocks():
    for layer, size in ((0, 3), (2, 3), (3, 4)):
        assert stage("prune-tofu", TOKENS, KEYS, layer).size.sum() == size


@pytest.mark.parametrize("strategy", ["tofu", "mlerp"])
def test_gradients_are_finite_at_zero(strategy):
    def total(tokens):
        return stage(strategy, tokens, KEYS).tokens.sum()

    for tokens in (jnp.zeros_like(TOKENS), TOKENS.at[0, 1].set(-TOKENS[0, 0])):
        assert np.isfinite(jax.grad(total)(tokens)).all()


def test_the_largest_of_several():
    merge = Merge(jnp.array([[3, 1]]), jnp.array([[0, 2, 4]]), jnp.array([[1, 1, 0]]))
    got = largest(jnp.array([[5.0, 2.0, 7.0, 3.0, 1.0]]), merge)
    np.testing.assert_array_equal(got, [[3, 7]])


def test_a_slope_between_the_ramps():
    for ramp, inflection in (("decreasing", -1), ("constant", 0), ("increasing", 1)):
        line = np.array(inflected(11, inflection, 12))
        np.testing.assert_allclose(line, removals(11, ramp, 12), atol=1)
    assert inflected(3, -0.5, 12, total=38)[0] == 11
    rising = inflected(3, 0.5, 12, total=38)
    assert sum(rising) == 38
    assert list(rising) == sorted(rising)
    assert inflected(4, 1.0, 1) == (0,)
    shape = ViTShape((10, 10), 4, 8, 2)
    counts = [block.out for block in plan(make_reducer("tofu", r=6, inflection=-0.5), shape)]
    assert counts == [91, 84, 79, 76]


def test_macs_are_tomes_without_sizes_and_with_norms():
    shape = ViTShape((14, 14), 12, 384, 6)
    matching = make_reducer("tome", r=13).macs(0, 196, shape) - 197 * 384
    assert make_reducer("tofu", r=13).macs(6, 196, shape) == matching
    assert make_reducer("tofu", r=13).macs(7, 196, shape) == matching + 196 + 183 * 384
    assert (
        make_reducer("tofu", r=13, strategy="mlerp").macs(0, 196, shape)
        == matching + 196 + 183 + 183 * 384
    )
    assert make_reducer("tofu", r=0).macs(7, 196, shape) == 0


def test_bad_settings():
    with pytest.raises(InputError, match="unknown ToFu strategy 'fuse'"):
        make_reducer("tofu", strategy="fuse")
    with pytest.raises(InputError, match="inflection must be from -1 to 1; got 2"):
        make_reducer("tofu", r=3, inflection=2.0)
    with pytest.raises(InputError, match="a ramp or an inflection; got ramp='increasing'"):
        make_reducer("tofu", r=3, inflection=0.5, ramp="increasing")
    with pytest.raises(InputError, match="ToFu: r must be at most half of the 10 patches; got 6"):
        make_reducer("tofu", r=6).check(ViTShape((1, 10), 4, 8, 2))
    with pytest.raises(InputError, match="ToFu: r must be at most half of the 10 patches; got 6"):
        make_reducer("tofu", r=4, inflection=-0.5).check(ViTShape((1, 10), 4, 8, 2))
