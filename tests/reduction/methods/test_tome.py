"""ToMe: equal to its original, its limits, and what a keep rate means to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.schedules import at_equal_cost
from tdm_jax.reduction.token_state import TokenKind, TokenState

DEIT = ViTShape((14, 14), 12, 384, 6)


@pytest.mark.golden
@pytest.mark.parametrize(("r", "kind"), [(3, "prop"), (3, "plain"), (5, "prop"), (5, "plain")])
def test_equals_the_original(answer, golden, r, kind):
    expected = golden(f"tome_r{r}_{kind}")
    logits, info = answer(make_reducer("tome", r=r, proportional_attention=kind == "prop"))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])
    # The original's source matrix counts the class token, which only stands for itself.
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])


def reference(tokens, size, metric, r, prefix):
    """One merge of a single image's patches, by loops over the definition."""
    n = len(tokens)
    a = [i for i in range(n) if (prefix + i) % 2 == 0]
    b = [i for i in range(n) if (prefix + i) % 2 == 1]
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    best = {i: max(b, key=lambda j: unit[i] @ unit[j]) for i in a}
    gone = sorted(a, key=lambda i: -unit[i] @ unit[best[i]])[:r]
    merged = []
    for i in [i for i in a if i not in gone] + b:
        members = [i, *(g for g in gone if best[g] == i)]
        total = sum(size[m] for m in members)
        merged.append((sum(size[m] * tokens[m] for m in members) / total, total))
    return np.array([m[0] for m in merged]), np.array([m[1] for m in merged])


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_any_prefix_against_the_reference(prefix):
    draw = np.random.default_rng(prefix)
    tokens = draw.standard_normal((2, 11, 6))
    size = draw.integers(1, 4, (2, 11)).astype(float)
    q, k, v = draw.standard_normal((3, 2, prefix + 11, 2, 3))
    state = TokenState.start(jnp.zeros((2, prefix, 6)), jnp.array(tokens, jnp.float32))
    state = state.replace(size=jnp.array(size, jnp.float32))
    shape = ViTShape((1, 11), 1, 6, 2, prefix, class_token=prefix > 0)
    view = AttentionView(*(jnp.array(x, jnp.float32) for x in (q, k, v, q[:, 0])), None, prefix)
    context = BlockContext(layer=0, shape=shape, train=False, weights={}, attention=view)
    after = jax.jit(lambda s: make_reducer("tome", r=4).reduce(s, context))(state)
    for image in range(2):
        metric = k[image, prefix:].mean(1)
        expected, sizes = reference(tokens[image], size[image], metric, 4, prefix)
        np.testing.assert_allclose(after.tokens[image], expected, atol=1e-5)
        np.testing.assert_allclose(after.size[image], sizes)
    single = np.asarray(after.kind) != TokenKind.MATCHED
    assert (np.asarray(after.size)[single] <= 3).all()


def test_at_most_half_merges():
    blocks = plan(make_reducer("tome", r=5), ViTShape((1, 10), 4, 8, 2))
    assert [block.out for block in blocks] == [5, 3, 2, 1]
    with pytest.raises(InputError, match="at most half of the 10 patches; got 6"):
        make_reducer("tome", r=6).check(ViTShape((1, 10), 4, 8, 2))
    with pytest.raises(InputError, match="a count of at least 5; got 4"):
        plan(make_reducer("tome", counts=(4,), layers=(1,)), ViTShape((1, 10), 4, 8, 2))


def test_a_keep_rate_costs_what_three_stages_of_it_cost():
    def seen(reducer):
        return sum(block.attention + block.mlp for block in plan(reducer, DEIT))

    for rate in (0.9, 0.7, 0.5):
        one = seen(make_reducer("tome", keep_rate=rate))
        assert abs(one / seen(make_reducer("topk", keep_rate=rate)) - 1) < 0.03
    assert at_equal_cost(make_reducer("tome", keep_rate=0.7).schedule, DEIT).r == 11
    assert at_equal_cost(make_reducer("tome", keep_rate=1.0).schedule, DEIT).r == 0


def test_sizes_weigh_the_keys_once_something_has_merged():
    state = TokenState.start(jnp.zeros((1, 2, 4)), jnp.zeros((1, 3, 4)))
    merged = state.replace(size=jnp.array([[1.0, 2.0, 3.0]]), moved=True)
    context = BlockContext(layer=1, shape=ViTShape((2, 3), 3, 4, 1, 2), train=False, weights={})
    reducer = make_reducer("tome", r=2)
    np.testing.assert_array_equal(reducer.key_weight(merged, context), [[1, 1, 1, 2, 3]])
    assert reducer.key_weight(state, context) is None
    plain = dataclasses.replace(reducer, proportional_attention=False)
    assert plain.key_weight(merged, context) is None


def test_every_block_is_a_stage_unless_told():
    sizes = {"image_size": 32, "patch_size": 8, "width": 8, "num_heads": 2, "num_classes": 3}
    model = create_model("vit", make_reducer("tome", r=2), depth=3, **sizes)
    assert [block.out for block in model.schedule] == [14, 12, 10]
    model = create_model("vit", make_reducer("tome", r=2, layers=(1,)), depth=3, **sizes)
    assert [block.out for block in model.schedule] == [16, 14, 14]
