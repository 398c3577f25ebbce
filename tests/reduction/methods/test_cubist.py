"""CubistMerge: equal to its original, and to its definition by loops, where the grid stays one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.methods.cubist import CubistMerge, merge_lines
from tdm_jax.reduction.token_state import TokenKind

SHAPE = ViTShape((4, 7), 3, 32, 2, 0, class_token=False)


# The others take a compilation each for the same lines of code.
GOLDENS = [
    (4, 1, 2),
    *(pytest.param(1, lines, lines, marks=pytest.mark.slow) for lines in (1, 2)),
]


@pytest.mark.golden
@pytest.mark.parametrize(("block", "rows", "columns"), GOLDENS)
def test_equals_the_original(answer, golden, block, rows, columns):
    expected = golden(f"cubist_block{block}_rh{rows}_rw{columns}")
    reducer = CubistMerge(block=block, remove_rows=rows, remove_columns=columns, shared="last")
    logits, info = answer(reducer)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()
    np.testing.assert_array_equal(info.assign, expected["map"])


def reference(line, r, shared):
    """One line by loops over the definition: its groups, and its values."""
    n = len(line)
    direction = line / np.linalg.norm(line, axis=-1, keepdims=True)
    choice = {}
    for o in range(1, n, 2):
        neighbours = [i for i in (o - 1, o + 1) if i < n]
        target = max(neighbours, key=lambda i: direction[o] @ direction[i])
        choice[o] = (target, direction[o] @ direction[target])
    gone = sorted(choice, key=lambda o: -choice[o][1])[:r]
    values = {i: line[i].copy() for i in range(n) if i not in gone}
    ranks = range(len(gone)) if shared == "all" else [*range(0, r, 2), *range(1, r, 2)]
    for rank in ranks:
        target = choice[gone[rank]][0]
        held = values[target] if shared == "all" else line[target]
        joins = line[gone[rank]]
        values[target] = np.where(np.abs(joins) > np.abs(held), joins, held)
    order = sorted(values)
    ends = [choice[i][0] if i in gone else i for i in range(n)]
    return np.array([values[i] for i in order]), [order.index(end) for end in ends]


@pytest.mark.parametrize("shared", ["all", "last"])
@pytest.mark.parametrize(("n", "r"), [(2, 1), (7, 1), (7, 3), (8, 2), (8, 4), (15, 5)])
def test_a_line_against_the_reference(n, r, shared):
    # Few directions, so that neighbours often share a target.
    lines = np.random.default_rng(n + r).standard_normal((40, n, 3)).astype(np.float32)
    merged, route = jax.jit(lambda x: merge_lines(x, r, shared))(lines)
    expected, places = zip(*(reference(line, r, shared) for line in lines), strict=True)
    np.testing.assert_array_equal(route, places)
    np.testing.assert_array_equal(merged, expected)


def test_what_two_tokens_share_is_the_largest_of_all_or_the_last():
    line = jnp.array([[[-1.0, 0, 0], [2.0, 3, 0], [2.0, 2, 0], [4.0, 2, 0], [0, 0, 1.0]]])
    for shared, expected in (("all", [4, 3, 0]), ("last", [4, 2, 0])):
        merged, route = merge_lines(line, 2, shared)
        np.testing.assert_array_equal(route, [[0, 1, 1, 1, 2]])
        np.testing.assert_array_equal(merged[0, 1], expected)


def test_the_grid_stays_rectangular_and_in_reading_order():
    """Where tokens stand goes on rising along rows and columns, as rotary positions need it."""
    reducer = CubistMerge(block=1, remove_rows=2, remove_columns=3)
    model = create_model(
        "vit",
        reducer,
        image_size=(16, 28),
        patch_size=4,
        width=32,
        depth=3,
        num_heads=2,
        num_classes=3,
        class_token=False,
    )
    images = jax.random.normal(jax.random.key(0), (2, 16, 28, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)
    _, info = jax.jit(functools.partial(model.apply, return_info=True))(params, images)
    assert reducer.grid(SHAPE) == (2, 4)
    assert info.token_counts == (28, 8, 8)
    places = np.indices((4, 7)).reshape(2, -1).T
    for assign in np.asarray(info.assign):
        mean = np.stack([places[assign == token].mean(axis=0) for token in range(8)])
        rows, columns = mean.reshape(2, 4, 2).transpose(2, 0, 1)
        assert (np.diff(rows, axis=0) > 0).all()
        assert (np.diff(columns, axis=1) > 0).all()
    np.testing.assert_array_equal(info.kind, np.where(info.size > 1, TokenKind.MATCHED, 0))


def test_nothing_to_remove_is_the_plain_model():
    reducer = CubistMerge(remove_rows=0, remove_columns=0)
    assert not reducer.acts(1, 28, SHAPE)
    assert reducer.macs(1, 28, SHAPE) == 0


def test_costs():
    reducer = CubistMerge(block=2, remove_rows=1, remove_columns=2)
    assert reducer.macs(1, 28, SHAPE) == 0
    assert reducer.macs(2, 28, SHAPE) == (4 * 6 + 5 * 3) * 32
    assert CubistMerge(remove_rows=0, remove_columns=2).macs(1, 28, SHAPE) == 4 * 6 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 3}, r"block must lie within the 3 blocks 0\.\.2; got 3"),
        ({"remove_rows": 3}, "remove_rows must be at most half of the grid's 4 rows; got 3"),
        ({"remove_columns": 4}, "remove_columns must be at most half of the grid's 7 columns"),
        ({"remove_rows": -1}, "remove_rows must be at least 0; got -1"),
        ({"shared": "first"}, "unknown CubistMerge shared 'first'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=message) as refused:
        make_reducer("cubist", **settings).check(SHAPE)
    assert "\n" not in str(refused.value)


def test_it_says_what_stands_in_place_of_a_keep_rate():
    with pytest.raises(InputError, match="no keep rate: expected remove_rows and remove_columns"):
        CubistMerge().at_keep_rate(0.7)
