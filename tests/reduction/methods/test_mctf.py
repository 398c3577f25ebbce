"""MCTF: equal to its original in every setting, its fusion against loops, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.analysis import costs
from tdm_jax.errors import InputError
from tdm_jax.ops.merging import Merge
from tdm_jax.reduction import ViTShape, describe_reducer, plan
from tdm_jax.reduction.methods.mctf import fusion, merged_map

# Ahead in three blocks, and at the end of each block. The others take a compilation each.
QUICK = ("fast0.35", "r5_noahead")
SLOW = (
    "r4", "r7floor", "r3_precise", "r4_unidir", "r4_attnpool", "r4_simonly", "r4_noprop", "r5_taus",
)  # fmt: skip
GOLDENS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_original(answer, golden, name):
    expected = golden(f"mctf_{name}")
    r, proportional, ahead, *taus, bidirectional, pooling = expected["setting"].tolist()
    reducer = make_reducer(
        "mctf",
        r=r if r < 1 else int(r),
        layers=tuple(expected["layers"].tolist()),
        proportional_attention=bool(proportional),
        one_step_ahead=int(ahead),
        **dict(zip(("tau_sim", "tau_info", "tau_size"), taus, strict=True)),
        bidirectional=bool(bidirectional),
        pooling=int(pooling),
    )
    logits, info = answer(reducer)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(info.size, expected["size"][:, 1:, 0])
    # The original's source matrix counts the class token, which only stands for itself.
    source = np.asarray(info.assign)[:, None] == np.arange(info.token_counts[-1])[:, None]
    np.testing.assert_array_equal(source, expected["source"][:, 1:, 1:])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def reference(attraction, first, second):
    """The tokens of one image by loops: for each the numbers of A, and of B behind them, in it."""
    m, others = attraction.shape
    best = attraction.argmax(1)
    gone = sorted(range(m), key=lambda i: -attraction[i, best[i]])[:first]
    held = {j: [m + j, *(i for i in gone if best[i] == j)] for j in range(others)}
    left = [i for i in range(m) if i not in gone]
    strength = {j: max(attraction[i, j] for i in left) for j in range(others)}
    order = sorted(range(others), key=lambda j: -strength[j]) if second else list(range(others))
    tokens = {i: [i] for i in left}
    for j in order[:second]:
        tokens[max(left, key=lambda i: attraction[i, j])] += held[j]
    return [set(tokens[i]) for i in left] + [set(held[j]) for j in order[second:]]


@pytest.mark.parametrize(("first", "second"), [(0, 1), (2, 3), (4, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("starts", [(0, 1), (1, 0)])
def test_fusion_against_loops(first, second, starts):
    sizes = (7, 6) if starts == (0, 1) else (6, 7)
    attraction = np.random.default_rng(first).random((3, *sizes)).astype(np.float32)
    route = fusion(jnp.array(attraction), starts, first, second).route(13)
    for image in range(3):
        # Patches in the order of their places.
        number = {starts[0] + 2 * i: i for i in range(sizes[0])}
        number |= {starts[1] + 2 * j: sizes[0] + j for j in range(sizes[1])}
        got = [set() for _ in range(13 - first - second)]
        for patch, end in enumerate(np.asarray(route[image])):
            got[end].add(number[patch])
        assert got == reference(attraction[image], first, second)


def test_the_map_of_merged_tokens_is_summed_by_column_and_averaged_by_row():
    draw = np.random.default_rng(0)
    attention, weight = draw.random((2, 3, 6, 6)), 0.5 + draw.random((2, 4))
    keep, gone, into = np.array([[2, 0]] * 2), np.array([[1, 3]] * 2), np.array([[1, 1]] * 2)
    # Two prefix tokens, patch 2, and patches 0, 1 and 3.
    member = np.zeros((6, 4))
    member[[0, 1, 4, 2, 3, 5], [0, 1, 2, 3, 3, 3]] = 1
    merge = Merge(*(jnp.array(x, jnp.int32) for x in (keep, gone, into)))
    got = merged_map(jnp.array(attention, jnp.float32), merge, jnp.array(weight, jnp.float32))
    for image in range(2):
        share = member * np.concatenate([np.ones(2), weight[image]])[:, None]
        share /= share.sum(0)
        expected = np.einsum("tm,htu,uk->hmk", share, attention[image], member)
        np.testing.assert_allclose(got[image], expected, rtol=1e-5)


def test_never_fewer_than_ten_tokens():
    shape = ViTShape((4, 5), 12, 8, 2)
    blocks = plan(make_reducer("mctf", r=6, layers="all"), shape)
    assert [block.out for block in blocks[:4]] == [14, 9, 9, 9]
    assert plan(make_reducer("mctf", r=3), ViTShape((1, 6), 12, 8, 2))[-1].out == 6


def test_a_share_is_a_keep_rate():
    reducer = make_reducer("mctf", r=0.35)
    assert describe_reducer(reducer) == {"name": "mctf", "keep_rate": 0.65}
    assert plan(reducer, ViTShape((8, 8), 12, 8, 2))[3] == (42, 42, 42)
    late = make_reducer("mctf", r=0.35, one_step_ahead=0)
    assert plan(late, ViTShape((8, 8), 12, 8, 2))[3] == (64, 64, 42)


def test_the_block_computes_what_is_counted():
    """Computing again costs queries, keys and logits more, as in the traced products."""
    model = {"image_size": 64, "patch_size": 8, "width": 24, "num_heads": 2, "depth": 1}

    def cost(ahead, convention):
        # Without proportional attention, so that no answer needs the sizes.
        settings = {"r": 20, "layers": (0,), "proportional_attention": False}
        reducer = make_reducer("mctf", one_step_ahead=ahead, **settings)
        return costs.count("vit", reducer, num_classes=5, convention=convention, **model).macs

    t, left, d, heads = 65, 45, 24, 2
    again = 2 * left * d * d + left * left * d
    assert cost(2, "torchprofile") - cost(1, "torchprofile") == (
        again + heads * left * left - heads * t * left
    )
    # The products that merge the map: by key, then by query, of those of A and of B that join.
    merging = 20 * 44 * heads * (t + left)
    assert cost(2, "matmul") - cost(1, "matmul") == again - merging


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 1.5}, "r must be a whole number, or a share below 1; got 1.5"),
        ({"tau_info": -1.0}, "tau_info must be at least 0; got -1.0"),
        ({"one_step_ahead": 3}, "one_step_ahead must be 0, 1 or 2; got 3"),
        ({"pooling": 2}, "pooling must be 0 for size or 1 for attention; got 2"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(InputError, match=message):
        make_reducer("mctf", **settings)
