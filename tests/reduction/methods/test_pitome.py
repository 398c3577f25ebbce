"""PiToMe: equal to its original, against loops over its definition, and its counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.analysis import costs
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.schedules import Schedule, at_equal_cost
from tdm_jax.reduction.token_state import TokenState

DEIT = ViTShape((14, 14), 12, 384, 6)


@pytest.mark.golden
@pytest.mark.parametrize(
    "ratio", [0.9375, *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (0.875, 0.95))]
)
def test_equals_the_original(answer, golden, ratio):
    expected = golden(f"pitome_ratio{ratio}")
    logits, info = answer(make_reducer("pitome", ratio=ratio))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])


def reference(tokens, size, metric, r, layer, depth):
    """One merge of a single image's patches, by loops over the definition."""
    n = len(tokens)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    alike, margin = unit @ unit.T, 0.75 - 0.75 * layer / depth

    def elu(t):
        return t if t > 0 else math.exp(t) - 1

    energy = [sum(elu(c - margin) for c in alike[j]) / n for j in range(n)]
    rank = sorted(range(n), key=lambda j: -energy[j])
    pairs, others = (rank, []) if layer < math.ceil(depth / 2) else (rank[: 2 * r], rank[2 * r :])
    a, b = pairs[0::2], pairs[1::2]
    best = {i: max(b, key=lambda j: alike[i, j]) for i in a}
    a = sorted(a, key=lambda i: -alike[i, best[i]])
    gone = a[:r]
    merged = []
    for i in [*a[r:], *others, *b]:
        members = [i, *(g for g in gone if best[g] == i)]
        total = sum(size[m] for m in members)
        merged.append((sum(size[m] * tokens[m] for m in members) / total, total))
    return np.array([m[0] for m in merged]), np.array([m[1] for m in merged])


@pytest.mark.parametrize(("layer", "prefix"), [(0, 0), (2, 5), (3, 1), (4, 2)])
def test_any_block_and_prefix_against_the_reference(layer, prefix):
    draw = np.random.default_rng(layer)
    tokens = draw.standard_normal((2, 11, 6))
    size = draw.integers(1, 4, (2, 11)).astype(float)
    q, k, v = draw.standard_normal((3, 2, prefix + 11, 2, 3))
    state = TokenState.start(jnp.zeros((2, prefix, 6)), jnp.array(tokens, jnp.float32))
    state = state.replace(size=jnp.array(size, jnp.float32))
    shape = ViTShape((1, 11), 5, 6, 2, prefix, class_token=prefix > 0)
    view = AttentionView(*(jnp.array(x, jnp.float32) for x in (q, k, v, q[:, 0])), None, prefix)
    context = BlockContext(layer=layer, shape=shape, train=False, weights={}, attention=view)
    after = jax.jit(lambda state: make_reducer("pitome", r=4).reduce(state, context))(state)
    for image in range(2):
        metric = k[image, prefix:].mean(1)
        expected, sizes = reference(tokens[image], size[image], metric, 4, layer, 5)
        np.testing.assert_allclose(after.tokens[image], expected, atol=1e-5)
        np.testing.assert_allclose(after.size[image], sizes)


def test_counts_are_those_of_double_precision():
    # 0.9 and 0.95 are no binary fractions: what is left rounds as the authors' program has it.
    for ratio in (0.9, 0.9125, 0.925, 0.95, 0.975):
        n, expected = 196, []
        for _ in range(12):
            n -= math.floor(n - n * ratio)
            expected.append(n)
        assert [block.out for block in plan(make_reducer("pitome", ratio=ratio), DEIT)] == expected


def test_a_keep_rate_costs_what_three_stages_of_it_cost():
    def seen(reducer):
        return sum(block.attention + block.mlp for block in plan(reducer, DEIT))

    for rate in (0.9, 0.7, 0.5):
        one = seen(make_reducer("pitome", keep_rate=rate))
        assert abs(one / seen(make_reducer("topk", keep_rate=rate)) - 1) < 0.03
    assert at_equal_cost(make_reducer("pitome", keep_rate=1.0).schedule, DEIT).ratio == 1
    assert make_reducer("pitome", ratio=0.9).at_keep_rate(0.7) == make_reducer(
        "pitome", keep_rate=0.7
    )


def test_macs_are_the_means_the_similarities_and_the_weighting():
    # Means of 197 keys of 64 channels, 196 x 196 similarities, 196 means, 196 weighted tokens.
    own = 197 * 64 + 196 * 196 * 64 + 196 + 196 * 384
    assert make_reducer("pitome", ratio=0.9).macs(0, 196, DEIT) == own
    assert make_reducer("pitome", ratio=0.9).macs(0, 9, DEIT) == 0
    assert costs.count("deit_small_patch16_224", "pitome", ratio=1.0).macs == 4_603_567_752


def test_at_most_half_merges():
    with pytest.raises(InputError, match="PiToMe: .*at most half .* at least 98; got 79"):
        plan(make_reducer("pitome", ratio=0.4), DEIT)
    with pytest.raises(InputError, match=r"PiToMe: ratio must be in \(0, 1\]; got 1\.1"):
        make_reducer("pitome", ratio=1.1)
    with pytest.raises(InputError, match="one of counts, r and ratio; got r=4, ratio=0.9"):
        make_reducer("pitome").scheduled(Schedule(ratio=0.9, r=4))
    with pytest.raises(InputError, match="expected one of .*; got r, ratio"):
        make_reducer("pitome", ratio=0.9, r=4)
    with pytest.raises(InputError, match="expected one of keep_rate.*; got keep_rate, ratio"):
        make_reducer("pitome", keep_rate=0.5, ratio=0.9)
    with pytest.raises(InputError, match="PiToMe: r must be at most half of the 196 patches"):
        make_reducer("pitome", r=99).check(DEIT)
    with pytest.raises(InputError, match="a count of at least 98; got 97"):
        plan(make_reducer("pitome", counts=(97,), layers=(1,)), DEIT)
    blocks = plan(make_reducer("pitome", r=3), ViTShape((1, 7), 4, 8, 2))
    assert [block.out for block in blocks] == [4, 2, 1, 1]
