"""The space of methods: parts of all axes fit together, and each part does what its axis promises.

`tdm_jax.reduction.axes` and what it holds: `tdm_jax.reduction.groupings`,
`tdm_jax.reduction.metrics`, `tdm_jax.reduction.averages`; and `tdm_jax.reduction.parts`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import describe_reducer, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.averages import AVERAGES, ByBoth, Centre
from tdm_jax.reduction.axes import AXES
from tdm_jax.reduction.groupings import GROUPINGS, Bipartite, DensityPeaks, Medoids, Members
from tdm_jax.reduction.importance import IMPORTANCES, ClassAttention
from tdm_jax.reduction.metrics import METRICS, HeadKeys, Keys, UnitTokens
from tdm_jax.reduction.token_state import TokenKind, TokenState

PATCHES, WIDTH, HEADS, BATCH = 15, 8, 2, 2
SHAPE = ViTShape((3, 5), 4, WIDTH, HEADS)
TOKENS = jax.random.normal(jax.random.key(0), (BATCH, PATCHES, WIDTH))
PREFIX = jnp.zeros((BATCH, 1, WIDTH))
QKV = jax.random.normal(jax.random.key(1), (3, BATCH, PATCHES + 1, HEADS, WIDTH // HEADS))
INPUTS = jax.random.normal(jax.random.key(2), (BATCH, PATCHES + 1, WIDTH))
MERGING = [name for name in AVERAGES if name not in ("norm", "centre")]


def stage(reducer, layer=1, train=False):
    """The context of a stage of this reducer, with random attention."""
    view = AttentionView(*QKV, QKV[0][:, 0], None, 1, normed=INPUTS)
    weights = reducer.init(jax.random.key(3), SHAPE)
    return BlockContext(layer=layer, shape=SHAPE, train=train, weights=weights, attention=view)


def run(reducer, layer=1):
    state = TokenState.start(PREFIX, TOKENS)
    return jax.jit(lambda s: reducer.after_attention(s, stage(reducer, layer)))(state)


def learned(*parts):
    return sum(part.learned for part in parts) > 1


POINTS = [
    (grouping, metric, average)
    for grouping in GROUPINGS
    for metric in METRICS
    for average in AVERAGES
    if not learned(METRICS[metric], AVERAGES[average])
]


@pytest.mark.parametrize("protected", [0.0, 0.3])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_point_is_a_method_with_a_plan_a_cost_and_a_description(grouping, protected):
    for metric, average in [(m, a) for g, m, a in POINTS if g == grouping]:
        reducer = make_reducer(
            "tdm",
            protected=protected,
            grouping=grouping,
            metric=metric,
            average=average,
            counts=(10,),
            layers=(1,),
        )
        reducer.check(SHAPE)
        after = jax.eval_shape(lambda r=reducer: run(r).tokens)
        assert after.shape == (BATCH, 10, WIDTH), (metric, average)
        assert plan(reducer, SHAPE)[1].out == 10
        assert reducer.macs(1, PATCHES, SHAPE) > 0
        again = make_reducer(**json.loads(json.dumps(describe_reducer(reducer))))
        assert again == reducer


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_grouping_makes_a_partition_of_the_count_it_is_asked_for(grouping):
    part = GROUPINGS[grouping]
    score = jax.random.uniform(jax.random.key(4), (BATCH, PATCHES))
    ones = jnp.ones((BATCH, PATCHES))
    members = Members(TOKENS, score, ones, stage(make_reducer("tdm")), prefix=1)
    for count in {PATCHES - 2, max(part.fewest(PATCHES), 3), part.fewest(PATCHES)}:
        merge = part.merge(members, count)
        assert merge.keep.shape == (BATCH, count)
        route = np.asarray(merge.route(PATCHES))
        # Each token is in a group, each group has a token, and what stays stays where it is.
        for image in range(BATCH):
            assert sorted(set(route[image])) == list(range(count))
            np.testing.assert_array_equal(route[image][merge.keep[image]], np.arange(count))


@pytest.mark.parametrize(
    ("grouping", "fewest"),
    [("density_peaks", 1), ("bipartite", 8), ("energy", 8), ("agglomeration", 1), ("medoids", 1)],
)
def test_a_matching_merges_half_at_most(grouping, fewest):
    assert GROUPINGS[grouping].fewest(PATCHES) == fewest
    assert GROUPINGS.keys() == {"density_peaks", "bipartite", "energy", "agglomeration", "medoids"}
    if fewest > 1:
        reducer = make_reducer("tome", grouping=grouping, counts=(7,), layers=(1,))
        with pytest.raises(InputError, match="of its 15 tokens; expected a count of at least 8"):
            plan(reducer, SHAPE)


def test_metrics_against_their_definitions():
    state, context = TokenState.start(PREFIX, TOKENS), stage(make_reducer("dtem"))
    tokens, keys, inputs = TOKENS, np.asarray(QKV[1][:, 1:]), INPUTS[:, 1:]
    weights = context.weights["stage_1"]
    expected = {
        "tokens": tokens,
        "unit_tokens": tokens / np.linalg.norm(tokens, axis=-1, keepdims=True),
        "keys": keys.mean(2),
        "head_keys": keys.reshape(BATCH, PATCHES, WIDTH),
        "inputs": inputs,
        "projection": inputs @ weights["kernel"] + weights["bias"],
    }
    assert expected.keys() == METRICS.keys()
    index = jnp.array([[3, 0, 14], [7, 7, 2]])
    for name, vectors in expected.items():
        part = METRICS[name]
        for places, of in (
            (None, vectors),
            (index, np.take_along_axis(np.asarray(vectors), index[..., None], axis=1)),
        ):
            got = part.of(state, context, weights, places)
            np.testing.assert_allclose(got, of, rtol=1e-5, atol=1e-6)
        assert part.width(SHAPE) == vectors.shape[-1]


def test_whom_a_token_joins_has_no_gradient():
    context = stage(make_reducer("tdm"))

    def of_tokens(tokens, name):
        vectors = METRICS[name].of(TokenState.start(PREFIX, tokens), context, {}, None)
        return vectors.sum()

    for name in ("tokens", "unit_tokens"):
        assert (jax.grad(of_tokens)(TOKENS, name) == 0).all()


def test_averages_against_their_definitions():
    draw = np.random.default_rng(0)
    size, score = draw.integers(1, 5, (BATCH, PATCHES)), draw.random((BATCH, PATCHES))
    state = TokenState.start(PREFIX, TOKENS).replace(size=jnp.array(size, jnp.float32))
    weights = {"kernel": jnp.array(draw.standard_normal((WIDTH, 1))), "bias": jnp.ones(1)}
    logit = np.asarray(TOKENS) @ np.asarray(weights["kernel"])
    ones = np.ones_like(score)
    expected = {
        "attention": (score, score),
        "uniform": (ones, ones),
        "size": (size, size),
        "size_attention": (size * score, size * score),
        "counted": (ones, size),
        "centre": (ones, ones),
        "scored": (np.exp(logit[..., 0]),) * 2,
        "norm": (ones, ones),
    }
    assert expected.keys() == AVERAGES.keys()
    for name, pair in expected.items():
        for proportional, value in enumerate(pair):
            got = AVERAGES[name].weigh(state, jnp.array(score), weights, bool(proportional))
            got = got / got.sum(1, keepdims=True)  # a common factor makes no other mean
            np.testing.assert_allclose(got, value / value.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("average", MERGING)
def test_a_group_becomes_its_mean_and_a_centre_stays(average):
    settings = dict(preset="diversity", grouping="bipartite", counts=(9,), layers=(1,))
    reducer = make_reducer("tdm", average=average, **settings)
    after = run(reducer)
    context, state = stage(reducer), TokenState.start(PREFIX, TOKENS)
    _, score = reducer.score(state, context)
    weights = context.weights.get("stage_0", {})
    weight = np.asarray(reducer.average.weigh(state, score, weights, False))
    centres = run(make_reducer("tdm", average="centre", **settings))
    np.testing.assert_array_equal(after.assign, centres.assign)
    grew = 0
    for image in range(BATCH):
        for token in range(9):
            members = np.flatnonzero(np.asarray(after.assign[image]) == token)
            w, x = weight[image, members, None], np.asarray(TOKENS[image, members])
            mean = (w * x).sum(0) / w.sum()
            np.testing.assert_allclose(after.tokens[image, token], mean, atol=1e-5)
            assert (np.asarray(centres.tokens[image, token]) == x).all(1).any()
            grew += len(members) > 1
    assert grew


def test_only_clusters_are_marked_as_clusters():
    settings = dict(protected=0.3, counts=(10,), layers=(1,))
    kinds = {}
    for name in GROUPINGS:
        after = run(make_reducer("tdm", grouping=name, **settings))
        if GROUPINGS[name].by_place:  # the attentive are where they were
            kinds[name] = set(np.asarray(after.kind).ravel().tolist())
        else:
            assert (after.kind[:, :3] == TokenKind.KEPT).all()
            kinds[name] = set(np.asarray(after.kind[:, 3:]).ravel().tolist())
    cluster, alone = {int(TokenKind.CLUSTER)}, {int(TokenKind.KEPT), int(TokenKind.MATCHED)}
    assert kinds == {
        "density_peaks": cluster,
        "bipartite": alone,
        "energy": alone,
        "agglomeration": alone,
        "medoids": cluster,
    }


def test_an_axis_takes_a_name_or_a_part_and_its_settings():
    named = make_reducer("tdm", grouping="bipartite", metric="head_keys", average="size_attention")
    assert named == make_reducer("tdm", grouping=Bipartite(), metric=HeadKeys(), average=ByBoth())
    assert make_reducer("tome", grouping="density_peaks", neighbors=3).grouping == DensityPeaks(
        neighbors=3
    )
    assert make_reducer("topk", importance="chance", seed=7).importance.seed == 7
    assert make_reducer("tdm", metric="unit_tokens").metric == UnitTokens()
    assert make_reducer("pitome", average="centre").average == Centre()
    for moved in ({}, {"grouping": "agglomeration"}):
        with pytest.raises(InputError, match="unknown setting of reducer 'tome' 'neighbors'"):
            make_reducer("tome", neighbors=3, **moved)
    with pytest.raises(InputError, match="unknown setting of reducer 'tdm' 'neighbors'"):
        make_reducer("tdm", grouping="bipartite", neighbors=3)
    assert AXES.keys() == {"importance", "grouping", "metric", "average"}


def test_parts_and_settings_that_fit_only_together_are_taken_together():
    reducer = make_reducer("tome", grouping="medoids", importance="class", average="attention")
    assert (reducer.grouping, reducer.importance) == (Medoids(), ClassAttention())
    reducer = make_reducer("dpcknn", metric="keys", place="between", grouping="bipartite")
    assert (reducer.place, reducer.metric) == ("between", Keys())


@pytest.mark.parametrize("axis", AXES)
def test_a_part_that_is_not_on_its_axis_is_named(axis):
    with pytest.raises(InputError, match=f"unknown {axis} of reducer 'tdm' 'nothing'; expected"):
        make_reducer("tdm", **{axis: "nothing"})


def test_every_part_has_one_name_and_stands_for_itself():
    for table in AXES.values():
        assert len(set(table.values())) == len(table)
        assert len({type(part) for part in table.values()}) == len(table)
        for part in table.values():
            part.validate("Name")
    assert AXES["importance"] is IMPORTANCES
