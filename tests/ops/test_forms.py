"""Every operation that platforms do in ways of their own answers alike in all of them.

Covers ops/class_row.py, and all but attention's form for a GPU, which needs one: see
test_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops.attention import attend
from tdm_jax.ops.class_row import class_row
from tdm_jax.ops.gathering import gather_sequence, gather_tokens
from tdm_jax.ops.merging import Merge, merge_groups
from tdm_jax.ops.ordering import argtopk
from tdm_jax.ops.patches import embed_patches
from tdm_jax.ops.platform import PLATFORMS, REFERENCE, pinned
from tdm_jax.ops.products import product

RANDOM = np.random.default_rng(0)
ORDER = jnp.array([RANDOM.permutation(9) for _ in range(3)])
# Two of nine tokens are dropped.
GROUPS = (
    Merge(ORDER[:, :2], ORDER[:, 4:6], jnp.array([[0, 1], [1, 1], [0, 0]])),
    Merge(ORDER[:, 2:4], ORDER[:, 6:7], jnp.array([[0], [1], [1]])),
)


def normal(*shape):
    return jnp.array(RANDOM.standard_normal(shape), jnp.float32)


# Operation, its arrays, and the platforms with a form that is not the reference.
OPERATIONS = {
    # Three parts of the queries, of which the last is smaller.
    "attend": (attend, (*(normal(1, 515, 1, 2) for _ in range(3)), normal(1, 515)), {"cpu"}),
    "argtopk": (functools.partial(argtopk, k=5), (normal(3, 9).round(),), {"cpu"}),
    "class_row": (class_row, (normal(3, 2, 4), normal(3, 9, 2, 4)), {"tpu"}),
    "embed_patches": (embed_patches, (normal(3, 8, 12, 3), normal(4, 4, 3, 5)), {"cpu"}),
    "gather_tokens of values": (gather_tokens, (normal(3, 9), ORDER[:, :4]), {"tpu"}),
    "gather_tokens of tokens": (gather_tokens, (normal(3, 9, 5), ORDER[:, :4]), {"tpu"}),
    "gather_sequence": (gather_sequence, (normal(3, 9, 5), ORDER[:, :4]), {"tpu"}),
    "merge_groups": (
        functools.partial(merge_groups, groups=GROUPS, route=GROUPS[0].beside(GROUPS[1]).route(9)),
        (normal(3, 11, 5), jnp.abs(normal(3, 9))),
        {"tpu"},
    ),
    "product": (product, (normal(3, 9, 5), normal(5, 4)), {"cpu"}),
}


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def answers(platform, operation, arrays):
    """What an operation answers in one platform's form, and its gradients."""
    with pinned(platform):
        answer = operation(*arrays)
        if not is_float(answer):
            return answer
        places = tuple(i for i, array in enumerate(arrays) if is_float(array))
        gradient = jax.grad(lambda *a: jnp.sin(operation(*a)).sum(), argnums=places)
        return answer, gradient(*arrays)


def program(platform, operation, arrays):
    with pinned(platform):
        return str(jax.make_jaxpr(lambda *a: operation(*a))(*arrays))


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_forms_agree(name):
    operation, arrays, own = OPERATIONS[name]
    expected = answers(REFERENCE, operation, arrays)
    plain = program(REFERENCE, operation, arrays)
    for platform in PLATFORMS:
        assert (program(platform, operation, arrays) != plain) == (platform in own)
        if platform in own:
            for ours, theirs in zip(
                jax.tree.leaves(answers(platform, operation, arrays)),
                jax.tree.leaves(expected),
                strict=True,
            ):
                assert ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_class_tokens_row_is_float32_in_half_precision():
    query, keys = normal(3, 2, 4), normal(3, 9, 2, 4)
    expected = np.einsum("bhk,bthk->bht", query, keys)
    for platform in (REFERENCE, "tpu"):
        row = answers(platform, class_row, (query.astype(jnp.bfloat16), keys.astype(jnp.bfloat16)))
        assert row[0].dtype == jnp.float32
        np.testing.assert_allclose(row[0], expected, atol=0.05)


def test_attention_in_bfloat16():
    # Three parts of the queries on a CPU; it rounds the same factors, in another order.
    qkv, bias = [normal(2, 515, 3, 8).astype(jnp.bfloat16) for _ in range(3)], normal(2, 515)
    for arrays in (qkv, [*qkv, bias]):
        expected, ours = (answers(platform, attend, arrays) for platform in (REFERENCE, "cpu"))
        assert program("cpu", attend, arrays) != program(REFERENCE, attend, arrays)
        for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            assert one.dtype == other.dtype
            exact, other = np.asarray(other, np.float32), np.asarray(one, np.float32)
            np.testing.assert_allclose(other, exact, rtol=0.02, atol=0.02 * np.abs(exact).max())
