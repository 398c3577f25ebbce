"""A program by plain operations gives the same, with nothing nested, padded or empty in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.errors import InputError
from tdm_jax.exporting import plain_operations

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)


def operations(function, *arguments):
    return {equation.primitive.name for equation in jax.make_jaxpr(function)(*arguments).eqns}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=7),
        lambda x: jax.lax.pad(x, 1.0, ((0, 0, 0), (-2, 1, 0), (1, -3, 0))),
        lambda x: jnp.stack([x, 2 * x], axis=1),
        jax.jit(lambda x: jax.checkpoint(jnp.sin)(x) + jax.lax.stop_gradient(x)),
        lambda x: jnp.concatenate([x[:, :0], x, x[:, 5:]], axis=1) + x[:, :0].sum(),
        lambda x: jnp.einsum("bnd,bmd->bnm", x[..., :0], x[..., :0]),
        lambda x: (x[:, :0] > 0).any(axis=1) | (x[:, 0] > 0),
        lambda x: x @ KERNEL,
    ],
)
def test_the_same_by_plain_operations(function):
    traced = jax.make_jaxpr(function)(X)
    (plain,) = plain_operations.run(traced, X)
    np.testing.assert_array_equal(plain, function(X))
    # The converter has its own `jnp.matmul` where this one is a nested product.
    left = operations(lambda x: plain_operations.run(traced, x), X)
    assert not left & {"pad", "stack", "remat2", "stop_gradient", "copy"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "draws random numbers"),
        (lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0))), "between an array's"),
        (lambda x: jnp.prod(x[:, :0], axis=1), "no converter takes reduce_prod of an array"),
    ],
)
def test_what_no_converter_can_do(function, message):
    with pytest.raises(InputError, match=message):
        plain_operations.run(jax.make_jaxpr(function)(X), X)
