"""ATC: equal to its original, and its clusters against loops over the definition.

With `tdm_jax.reduction.linkage`.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.linkage import LINKAGES, clusters, cosine_distance, spanning_tree
from tdm_jax.reduction.token_state import TokenState

GOLDENS = {
    **{f"{linkage}_keep{rate}": {"linkage": linkage, "keep_rate": rate}
       for linkage, rate in itertools.product(LINKAGES, (0.7, 0.5))},
    "average_keep0.7_noprop": {"keep_rate": 0.7, "proportional_attention": False},
}  # fmt: skip
# The original counts the class token twice: its r is one more.
OFF_THE_SHELF = {"average_r5": {"r": 4}, "single_r4": {"r": 3, "linkage": "single"}}
# Both ways to cluster, by the tree and by the loop; the others take a compilation each.
QUICK = {"single_keep0.7", "average_keep0.7"}
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*GOLDENS, *OFF_THE_SHELF)
]


def numbered(assign):
    """Groups by their first member, the class token's the first."""
    groups = []
    for row in np.asarray(assign):
        number = {}
        groups.append([0, *(1 + number.setdefault(group, len(number)) for group in row)])
    return groups


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_original(answer, golden, name):
    stages = name in GOLDENS
    settings = GOLDENS[name] if stages else {**OFF_THE_SHELF[name], "layers": "all"}
    expected = golden(f"atc_{name}" if stages else f"atcssl_{name}")
    logits, info = answer(make_reducer("atc", **settings))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(numbered(info.assign), expected["map"])
    if stages:
        np.testing.assert_array_equal(numbered(info.stages[0].assign), expected["labels_block3"])


def reference(distance, count, linkage):
    """Clusters of one image, by loops over the definition: sets of tokens."""
    groups = [{i} for i in range(len(distance))]
    how = {"single": np.min, "complete": np.max, "average": np.mean}[linkage]
    while len(groups) > count:
        a, b = min(
            itertools.combinations(range(len(groups)), 2),
            key=lambda pair: how(
                [distance[i, j] for i in groups[pair[0]] for j in groups[pair[1]]]
            ),
        )
        groups[a] |= groups.pop(b)
    return sorted(sorted(group) for group in groups)


def grouped(merge, n):
    """Sets of tokens, in the order that they come out."""
    route = np.asarray(merge.route(n))
    return [
        [np.flatnonzero(row == place).tolist() for place in range(row.max() + 1)] for row in route
    ]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_clusters_against_the_reference(linkage, count):
    distance = cosine_distance(jnp.asarray(np.random.default_rng(count).normal(size=(3, 13, 4))))
    found = grouped(clusters(distance, count, linkage), 13)
    for groups, matrix in zip(found, np.asarray(distance), strict=True):
        # In the order of their first tokens.
        assert groups == reference(matrix, count, linkage)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_equal_distances_leave_as_many_clusters(linkage):
    for apart in (0.0, 1.0):
        distance = jnp.where(jnp.eye(6, dtype=bool), 0.0, apart)[None]
        (groups,) = grouped(clusters(distance, 4, linkage), 6)
        assert len(groups) == 4
        assert sorted(itertools.chain(*groups)) == list(range(6))


def test_single_linkage_cuts_equal_edges_where_the_tree_can_part():
    # 0-1 and 0-2 are as long as 0-3 and 3-4: whichever are cut, what stays together is connected.
    near = {(0, 1), (0, 2), (0, 3), (3, 4)}
    distance = np.full((5, 5), 2.0)
    for i, j in near:
        distance[i, j] = distance[j, i] = 1.0
    for count in (2, 3, 4):
        (groups,) = grouped(clusters(jnp.asarray(distance)[None], count, "single"), 5)
        links = [sum((i, j) in near for i in group for j in group) for group in groups]
        assert links == [len(group) - 1 for group in groups]


def test_the_tree_of_points_on_a_line():
    place = np.array([0.0, 7.0, 1.0, 3.0])
    order, length = spanning_tree(jnp.asarray(abs(place[:, None] - place), jnp.float32)[None])
    assert order.tolist() == [[0, 2, 3, 1]]
    assert length.tolist() == [[1.0, 2.0, 4.0]]


def test_without_proportional_attention_each_token_counts_once():
    # Tokens 0 and 2 point the same way, and their sizes differ.
    keys = jnp.array([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]])[:, :, None]
    state = TokenState.start(
        jnp.zeros((1, 0, 2)), jnp.array([[[1.0, 0.0], [5.0, 5.0], [2.0, 4.0]]])
    )
    state = state.replace(size=jnp.array([[3.0, 1.0, 1.0]]), moved=True)
    view = AttentionView(keys, keys, keys, keys[:, 0], None, 0)
    shape = ViTShape((1, 5), 2, 2, 1, 0, class_token=False)
    context = BlockContext(layer=1, shape=shape, train=False, weights={}, attention=view)
    for proportional, expected in ((True, [1.25, 1.0]), (False, [1.5, 2.0])):
        reducer = make_reducer("atc", counts=(2,), layers=(1,), proportional_attention=proportional)
        after = reducer.reduce(state, context)
        np.testing.assert_allclose(after.tokens[0], [expected, [5.0, 5.0]], rtol=1e-6)
        np.testing.assert_array_equal(after.size, [[4, 1]])
        assert (reducer.key_weight(state, context) is None) != proportional


def test_counts_go_by_the_start_and_macs_by_tomes_convention():
    shape = ViTShape((14, 14), 12, 384, 6)
    counts = [block.out for block in plan(make_reducer("atc"), shape)]
    assert counts[2::3] == [196, 137, 96, 67]
    own = 197 * 64 + 196 * 196 * 64 + 196 * 384
    assert make_reducer("atc").macs(3, 196, shape) == own
    assert make_reducer("atc").macs(4, 137, shape) == 0


def test_bad_settings():
    with pytest.raises(InputError, match="unknown ATC linkage 'ward'"):
        make_reducer("atc", linkage="ward")
