"""ATS: equal to its original, image by image, whatever the batch and the slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.contract import Attention
from tdm_jax.reduction.importance import HeadValueNorm
from tdm_jax.reduction.methods.ats import sample
from tdm_jax.reduction.token_state import TokenKind, TokenState

SHAPE = ViTShape(grid=(4, 5), depth=4, width=8, num_heads=2)


class Peaked(Attention):
    """An attention whose score is given: one value for each head and patch, values of norm 1."""

    def __init__(self, score):
        self.score = jnp.asarray(score, jnp.float32)

    def class_row(self):
        return jnp.stack([self.score, self.score], axis=1) / 2

    def values(self):
        return jnp.zeros((*self.score.shape, 2, 4)).at[..., 0].set(1.0)


def reference(score, valid, points):
    """The patches that the points pick, by the definition."""
    picked = set()
    for t in range(points):
        at = (2 * t + 1) / (2 * (points + 1))
        real = np.flatnonzero(valid)
        gaps = [abs(score[: j + 1].sum() - at) for j in real]
        picked.add(int(real[int(np.argmin(gaps))]))
    return sorted(picked)


@pytest.fixture
def state():
    tokens = jax.random.normal(jax.random.key(0), (3, 20, 8))
    return TokenState.start(jnp.zeros((3, 1, 8)), tokens, keep_dropped=True)


@pytest.fixture
def score():
    """From even to one patch that has almost all."""
    draw = jax.random.uniform(jax.random.key(1), (3, 20))
    peaked = jnp.power(draw, jnp.array([[0.1], [2.0], [30.0]]))
    return np.asarray(peaked / peaked.sum(axis=1, keepdims=True))


def context(layer=1):
    return BlockContext(layer=layer, shape=SHAPE, train=False, weights={})


def stage(reducer, state, score, layer=1):
    return reducer.after_attention(state, context(layer).replace(attention=Peaked(score)))


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.5, 0.7])
def test_equals_the_original(golden, answer, keep_rate):
    expected = golden(f"ats_keep{keep_rate}")
    logits, info = answer(make_reducer("ats", keep_rate=keep_rate))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [info.token_counts[layer] + 1 for layer in (3, 6, 9)] == expected["capacity"].tolist()
    kept = [(s.size > 0).sum(axis=1) for s in info.stages]
    assert len({int(k) for k in np.concatenate(kept)}) > 3  # images do differ


def test_sampling_follows_the_definition(score):
    valid = np.ones_like(score)
    valid[1, 5:8] = 0
    shares = score * valid / (score * valid).sum(axis=1, keepdims=True)
    picked = sample(jnp.asarray(shares), jnp.asarray(valid), 10)
    for b in range(3):
        assert np.flatnonzero(picked[b]).tolist() == reference(shares[b], valid[b], 10)


def test_survivors_stay_in_order_and_empty_slots_are_masked(state, score):
    after = stage(make_reducer("ats", keep_rate=0.5, layers=(1,)), state, score)
    assert after.count == 10
    weight = make_reducer("ats", layers=(1,)).key_weight(after, context())
    assert weight.shape == (3, 11)
    assert (weight[:, 0] == 1).all()
    for b in range(3):
        survivors = reference(score[b], np.ones(20), 10)
        count = len(survivors)
        np.testing.assert_array_equal(after.tokens[b, :count], state.tokens[b, survivors])
        np.testing.assert_array_equal(after.valid[b], np.arange(10) < count)
        assert np.flatnonzero(after.assign[b] >= 0).tolist() == survivors
        np.testing.assert_array_equal(after.size[b], after.valid[b])
    assert after.valid[2].sum() < 5  # one patch had almost all the score


def test_a_second_stage_never_picks_an_empty_slot(state, score):
    reducer = make_reducer("ats", keep_rate=0.5, layers=(1, 2))
    first = stage(reducer, state, score)
    even = np.full((3, 10), 0.1)
    second = stage(reducer, first, even, layer=2)
    assert second.count == 5
    assert (second.valid.sum(axis=1) <= first.valid.sum(axis=1)).all()
    np.testing.assert_array_equal((second.assign >= 0).sum(axis=1), second.valid.sum(axis=1))


def test_with_fewer_slots_the_survivors_of_lowest_score_go(state, score):
    after = stage(make_reducer("ats", keep_rate=0.5, layers=(1,), counts=(4,)), state, score)
    assert after.count == 4
    for b in range(3):
        survivors = reference(score[b], np.ones(20), 10)
        best = sorted(sorted(survivors, key=lambda j: -score[b, j])[:4])
        assert np.flatnonzero(after.assign[b] >= 0).tolist() == best


def test_with_tdm_what_is_not_sampled_is_clustered(state, score):
    # Matching off: every attentive token stands for itself.
    reducer = make_reducer("ats+tdm", keep_rate=0.5, layers=(1,), match_rate=1.0)
    after = stage(reducer, state, score)
    assert after.count == 10
    assert after.valid is None
    assert (after.assign >= 0).all()
    clusters = np.asarray(after.kind == TokenKind.CLUSTER)
    attentive = int((~clusters[0]).sum())
    for b in range(3):
        alone = np.flatnonzero(~clusters[b][np.asarray(after.assign[b])])
        assert set(reference(score[b], np.ones(20), attentive)) <= set(alone.tolist())


def test_values_weigh_in_head_by_head(state):
    class TwoHeads(Peaked):
        def class_row(self):
            return jnp.stack([self.score, 3 * self.score], axis=1)

        def values(self):
            return jnp.zeros((3, 20, 2, 4)).at[:, 3, 1, :].set(1.0)  # norm 2 in the second head

    row = np.full((3, 20), 0.01, np.float32)
    score = HeadValueNorm().measure(state, context().replace(attention=TwoHeads(row)), {})
    np.testing.assert_allclose(score[:, 3], 0.06 / (0.06 + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(score.sum(axis=1), score[:, 3])


def test_bad_settings():
    with pytest.raises(InputError, match="expected a class token"):
        make_reducer("ats", layers=(1,)).check(
            ViTShape((4, 5), 4, 8, 2, prefix=0, class_token=False)
        )
    with pytest.raises(InputError, match=r"at most the 20 patches; got \(30,\)"):
        make_reducer("ats", layers=(1,), counts=(30,)).check(SHAPE)
