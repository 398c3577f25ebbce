"""A-ViT: equal to its original; every token's weights sum to 1; what its losses measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.methods.avit import AViT, divergence
from tdm_jax.reduction.token_state import TokenState

SHAPE = ViTShape(grid=(3, 4), depth=4, width=8, num_heads=2, prefix=2)


def run(reducer, values, state=None):
    """The state after blocks that put out `values`, [l, b, t, d], whatever goes in.

    Slots follow their patches: the slot of patch i gets row i.
    """
    s = SHAPE.prefix
    state = TokenState.start(values[0][:, :s], values[0][:, s:], keep_dropped=True)
    states = []
    for layer, value in enumerate(values):
        context = BlockContext(layer=layer, shape=SHAPE, train=False, weights={})
        owner = jnp.stack(
            [jnp.argmax(state.assign == slot, axis=1) for slot in range(state.count)], axis=1
        )
        tokens = jnp.take_along_axis(value[:, s:], owner[..., None], axis=1)
        state = reducer.after_block(state.replace(prefix=value[:, :s], tokens=tokens), context)
        states.append(state)
    return states


def reference(values, scale, center, eps):
    """Output, blocks lived through and remainder of one token, by the definition."""
    output, total = 0.0, 0.0
    for layer, y in enumerate(values):
        h = 1 / (1 + np.exp(-(scale * y[0] - center)))
        if layer == len(values) - 1 or total + h >= 1 - eps:
            return output + (1 - total) * y, layer + 1, 1 - total
        output, total = output + h * y, total + h
    raise AssertionError("the last block always halts")


@pytest.fixture
def values():
    return jax.random.normal(jax.random.key(0), (4, 3, 14, 8))


@pytest.mark.golden
@pytest.mark.parametrize(("scale", "center"), [(1, 3), (2, 4)])
def test_equals_the_original(golden, answer, scale, center):
    expected = golden(f"avit_scale{scale}_center{center}")
    logits, info = answer(AViT(scale=scale, center=center))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_array_equal(info.carry["depth"], expected["depth"])
    ponder = info.carry["depth"] + info.carry["remainder"]
    np.testing.assert_allclose(ponder, expected["rho"], atol=1e-4)


def test_follows_the_definition(values):
    state = run(AViT(scale=2, center=0.5, eps=0.05), values)[-1]
    output = np.concatenate([state.prefix, state.tokens], axis=1)
    for b in range(3):
        for t in range(14):
            own, depth, remainder = reference(np.asarray(values[:, b, t]), 2, 0.5, 0.05)
            np.testing.assert_allclose(output[b, t], own, atol=1e-5)
            assert state.carry["depth"][b, t] == depth
            np.testing.assert_allclose(state.carry["remainder"][b, t], remainder, atol=1e-6)


@pytest.mark.parametrize("counts", [None, (8, 5, 1), (12, 12, 12)])
def test_weights_sum_to_1_however_many_slots(counts, values):
    # The first channel decides when a token halts, the others never change.
    constant = values.at[..., 1:].set(values[:1, ..., 1:])
    state = run(AViT(scale=2, center=1, counts=counts), constant)[-1]
    output = jnp.concatenate([state.prefix, state.tokens], axis=1)
    np.testing.assert_allclose(output[..., 1:], constant[0, ..., 1:], atol=1e-5)
    assert state.valid is None
    np.testing.assert_array_equal(state.assign, np.broadcast_to(np.arange(12), (3, 12)))


def test_slots_that_suffice_change_nothing(values):
    exact = run(AViT(scale=2, center=1), values)
    counts = tuple(int((state.size > 0).sum(axis=1).max()) for state in exact[:-1])
    assert counts[-1] < counts[0]
    fixed = run(AViT(scale=2, center=1, counts=counts), values)
    assert [state.count for state in fixed] == [*counts, 12]
    np.testing.assert_allclose(fixed[-1].tokens, exact[-1].tokens, atol=1e-6)
    np.testing.assert_array_equal(fixed[-1].carry["depth"], exact[-1].carry["depth"])


def test_without_enough_slots_those_with_the_smallest_remainder_halt(values):
    exact = run(AViT(scale=2, center=1), values)[0]
    fixed = run(AViT(scale=2, center=1, counts=(3, 3, 3)), values)[0]
    for b in range(3):
        alive = np.flatnonzero(exact.carry["alive"][b, 2:])
        by_remainder = alive[np.argsort(-exact.carry["remainder"][b, 2:][alive], kind="stable")]
        assert set(np.flatnonzero(fixed.assign[b] >= 0)) == set(by_remainder[:3])


def test_halted_tokens_are_zero_hidden_and_sourceless(values):
    reducer = AViT(scale=2, center=0.5)
    state = run(reducer, values)[1]
    halted = np.asarray(state.carry["alive"] == 0)
    assert halted[:, :2].any()
    assert halted[:, 2:].any()
    context = BlockContext(layer=2, shape=SHAPE, train=False, weights={})
    np.testing.assert_array_equal(reducer.key_weight(state, context), ~halted)
    assert not np.asarray(state.sequence())[halted].any()
    np.testing.assert_array_equal(state.assign == -1, halted[:, 2:])


def test_losses_measure_depth_and_its_distribution(values):
    reducer = AViT(scale=2, center=1, ponder_weight=0.5, prior_weight=2.0, prior_depth=0.5)

    class Info:
        carry = run(reducer, values)[-1].carry

    losses = reducer.losses(Info, None, None)
    ponder = (Info.carry["depth"] + Info.carry["remainder"]).mean()
    np.testing.assert_allclose(losses["ponder"], 0.5 * ponder, rtol=1e-6)
    halting = np.asarray(Info.carry["halting"])
    assert halting.shape == (3, 4)
    prior = np.exp(-0.5 * (np.arange(4) - 2.0) ** 2)
    prior, share = prior / prior.sum(), halting.mean(axis=0) / halting.mean(axis=0).sum()
    expected = 2.0 * (prior * np.log(prior / np.clip(share, 0.01, 0.99))).sum()
    np.testing.assert_allclose(losses["depth_prior"], expected, rtol=1e-5)


def test_divergence_is_0_at_the_prior():
    prior = jnp.exp(-0.5 * (jnp.arange(4) - 2.0) ** 2)
    np.testing.assert_allclose(divergence(0.3 * prior, 0.5), 0.0, atol=1e-6)
    assert divergence(prior[::-1], 0.5) > 0.1


def test_ponder_cost_has_a_gradient(values):
    def ponder(values):
        carry = run(AViT(scale=2, center=1), values)[-1].carry
        return (carry["depth"] + carry["remainder"]).mean()

    gradient = jax.grad(ponder)(values)
    assert np.isfinite(gradient).all()
    assert (gradient[..., 0] < 0).any()  # a larger score halts sooner
    assert not gradient[..., 1:].any()


def test_center_follows_the_width():
    tiny, small = (ViTShape((3, 4), 4, width, 2) for width in (192, 384))
    assert make_reducer("avit")._center(tiny) == 30
    assert make_reducer("avit")._center(small) == 75
    assert AViT(center=4.0)._center(small) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale must be above 0; got 0"),
        ({"eps": 1.0}, r"eps must be in \(0, 1\); got 1"),
        ({"prior_depth": 8.0}, r"prior_depth must be in \[0, 1\]; got 8"),
        ({"counts": (3, 4, 5)}, "must not rise"),
        ({"counts": (3, 2)}, r"3 blocks before the last; got \(3, 2\)"),
        ({"counts": (13, 2, 1)}, r"at most the 12 patches; got \(13, 2, 1\)"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        AViT(**settings).check(SHAPE)
