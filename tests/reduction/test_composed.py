"""TDM against its oracle, each stage against a slow float64 reference from TDM.md, and what fits.

`tdm_jax.reduction.composed` and `tdm_jax.reduction.methods.tdm`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import load_pretrained, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import BlockContext, ViTShape
from tdm_jax.reduction.token_state import TokenKind, TokenState
from tests.reduction.test_density_peaks import reference as clusters_of

GOLDENS = Path(__file__).parents[1] / "goldens"
DEIT = ViTShape((14, 14), 12, 384, 6)
STAGE = BlockContext(layer=1, shape=DEIT, train=False, weights={})
# The others take a compilation each for the same lines of code.
SLOW = pytest.mark.slow
ORACLE = [
    ("published", 0.7),
    pytest.param("published", 0.6, marks=SLOW),
    pytest.param("published", 0.5, marks=SLOW),
    ("published", 0.4),
    pytest.param("published", 0.3, marks=SLOW),
    pytest.param("published", 0.2, marks=SLOW),
    pytest.param("default", 0.9, marks=SLOW),
    ("default", 0.7),
    pytest.param("default", 0.5, marks=SLOW),
    ("default", 0.3),
]


@pytest.mark.golden
@pytest.mark.parametrize(("preset", "keep_rate"), ORACLE)
def test_equals_the_oracle(answer, golden, preset, keep_rate):
    expected = golden("tdm_oracle")
    logits, info = answer(make_reducer("tdm", keep_rate=keep_rate, preset=preset))
    np.testing.assert_allclose(logits, expected[f"{preset}_{keep_rate}"], atol=1e-4)
    tokens = expected[f"{preset}_{keep_rate}_tokens"].tolist()
    assert [n + 1 for n in info.token_counts] == tokens


@pytest.mark.golden
@pytest.mark.parametrize(
    "keep_rate", [0.7, *(pytest.param(rate, marks=SLOW) for rate in (0.9, 0.5, 0.3))]
)
def test_equals_the_oracle_with_a_distillation_token(golden, keep_rate):
    images = np.load(GOLDENS / "images_nchw.npy").transpose(0, 2, 3, 1)
    path = GOLDENS / "facebook_deit_distilled.pth"
    model, params = load_pretrained(path, "tdm", keep_rate, num_heads=3)
    expected = golden("tdm_oracle")[f"distilled_default_{keep_rate}"]
    np.testing.assert_allclose(jax.jit(model.apply)(params, images), expected, atol=1e-4)


def reference(z, a, attentive, matched, clusters, fused, merge):
    """One stage on one image: the tokens, the map and the kinds, by loops over TDM.md."""
    n = len(z)
    order = sorted(range(n), key=lambda i: (-a[i], i))
    first, rest = order[:attentive], order[attentive:]
    groups, kinds = [], []
    if merge == "cluster" and matched < attentive:
        route = clusters_of(z[first], matched)
        groups = [[first[i] for i in np.flatnonzero(route == c)] for c in range(matched)]
    else:
        destinations, sources = first[0::2], first[1::2]
        unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
        best = {i: max(destinations, key=lambda j: unit[i] @ unit[j]) for i in sources}
        by_match = sorted(sources, key=lambda i: -(unit[i] @ unit[best[i]]))
        gone, stay = by_match[: attentive - matched], by_match[attentive - matched :]
        groups = [[d, *(s for s in gone if best[s] == d)] for d in destinations]
        groups += [[s] for s in stay]
    kinds = [TokenKind.KEPT if len(g) == 1 else TokenKind.MATCHED for g in groups]
    if clusters:
        route = clusters_of(z[rest], clusters)
        groups += [[rest[i] for i in np.flatnonzero(route == c)] for c in range(clusters)]
        kinds += [TokenKind.CLUSTER] * clusters
    tokens = [(a[g, None] * z[g]).sum(0) / a[g].sum() for g in groups]
    assign = np.full(n, -1)
    for index, group in enumerate(groups):
        assign[group] = index
    if fused:
        tokens.append((a[rest, None] * z[rest]).sum(0))
        kinds.append(TokenKind.FUSED)
    return np.array(tokens), assign, np.array(kinds)


@pytest.mark.parametrize(
    ("settings", "keep_rate"),
    [
        ({}, 0.7),
        ({}, 0.3),
        ({"preset": "published"}, 0.7),
        ({"preset": "published"}, 0.4),
        ({"attentive_merge": "cluster", "fuse": True}, 0.5),
        ({"preset": "importance"}, 0.5),
        ({"preset": "diversity"}, 0.5),
    ],
)
def test_a_stage_against_the_reference(settings, keep_rate):
    reducer = make_reducer("tdm", keep_rate=keep_rate, layers=(1,), **settings)
    draw = np.random.default_rng(0)
    z, a = draw.standard_normal((2, 23, 7)), draw.random((2, 23)) / 23
    counts = reducer.counts(0, 23, DEIT)
    state = TokenState.start(jnp.zeros((2, 1, 7)), jnp.array(z))
    after = jax.jit(lambda s, score: reducer.apply(s, score, counts, STAGE))(state, jnp.array(a))
    assert after.tokens.shape[1] == counts.total
    for image in range(2):
        tokens, assign, kinds = reference(z[image], a[image], *counts, reducer.decoupling.merge)
        if counts.attentive == counts.matched:
            # Nothing merges, and the order is not defined: compare as sets.
            tokens_of = lambda t: t[np.lexsort(np.asarray(t).T)]  # noqa: E731
            np.testing.assert_allclose(
                tokens_of(np.asarray(after.tokens[image])), tokens_of(tokens), atol=1e-5
            )
            np.testing.assert_array_equal(np.sort(after.kind[image]), np.sort(kinds))
            np.testing.assert_array_equal(np.asarray(after.assign[image]) < 0, assign < 0)
            continue
        np.testing.assert_allclose(after.tokens[image], tokens, atol=1e-5)
        np.testing.assert_array_equal(after.assign[image], assign)
        np.testing.assert_array_equal(after.kind[image], kinds)


def test_the_fused_token_overlaps_the_clusters_and_has_size_0():
    reducer = make_reducer("evit+tdm", counts=(9,), layers=(1,))
    state = TokenState.start(jnp.zeros((1, 1, 4)), jax.random.normal(jax.random.key(0), (1, 16, 4)))
    counts = reducer.counts(0, 16, DEIT)
    assert (counts.total, counts.fused) == (9, 1)
    after = reducer.apply(state, jnp.arange(16.0)[None] / 136, counts, STAGE)
    assert (after.size[0, -1], after.kind[0, -1], after.size.sum()) == (0, TokenKind.FUSED, 16)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tdm", {"average": "sum"}, "unknown average of reducer 'tdm' 'sum'"),
        ("tdm", {"neighbors": 0}, "neighbors must be at least 1; got 0"),
        ("tdm", {"atentive_rate": 0.3}, "did you mean 'attentive_rate'"),
        ("tdm", {"preset": "published", "round_to": 8}, "without counts, r and round_to"),
        ("tdm", {"cluster_rate": 0.3, "counts": (20, 10, 5)}, "without counts, r and round_to"),
        ("tdm", {"place": "behind"}, "expected place before or between; got 'behind'"),
        ("topk", {"preset": "default"}, "expected a grouping, or preset='importance'"),
        ("tome", {"preset": "default"}, "ToMe: expected an importance to go by; got none"),
        ("tome", {"average": "attention"}, "ToMe: expected an importance to go by; got none"),
        ("tome", {"grouping": "medoids"}, "ToMe: expected an importance to go by; got none"),
        ("tome", {"place": "before"}, "before a block there is no attention to take a metric from"),
        ("dtem", {"average": "scored"}, "expected one learned part; got Projection and Scored"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        make_reducer(name, **settings)


def test_with_proportional_attention_merging_what_is_alike_changes_nothing(tiny_model):
    """Sixteen patches of four kinds, without positions, become four tokens."""
    kinds = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 3))
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (1, 2, 5, 8)))
    rows = kinds[:, order].reshape(2, 4, 4, 4, 4, 3)
    images = rows.transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 16, 3)

    def answer(reducer):
        model, variables = tiny_model(reducer, layer_norm_eps=1e-3)
        params = {**variables["params"]}
        params["pos_embed"] = params["pos_embed"] * 0
        return jax.jit(model.apply)({"params": params}, images)

    def four_tokens(**settings):
        settings |= dict(preset="diversity", average="size", counts=(4,), layers=(1,))
        return make_reducer("tdm", **settings)

    unreduced = answer("none")
    merged = answer(four_tokens(proportional_attention=True))
    np.testing.assert_allclose(merged, unreduced, atol=1e-4)
    assert np.abs(answer(four_tokens()) - unreduced).max() > 1e-2


def test_a_token_counts_as_often_as_it_has_patches_and_once_without_any():
    state = TokenState.start(jnp.zeros((1, 2, 3)), jnp.ones((1, 4, 3)))
    reducer = make_reducer("tdm", proportional_attention=True)
    assert reducer.key_weight(state, STAGE) is None
    state = state.replace_tokens(
        jnp.ones((1, 3, 3)), jnp.array([[0, 0, 0, 1]]), jnp.zeros((1, 3), int)
    )
    np.testing.assert_array_equal(reducer.key_weight(state, STAGE), [[1, 1, 3, 1, 1]])
    assert make_reducer("tdm").key_weight(state, STAGE) is None
