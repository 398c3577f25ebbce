"""The twin that only slices: as many tokens as its method has, everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.reduction.sliced import Sliced

LIKE = {
    "topk": {"layers": (1, 2)},
    "dpcknn": {"layers": (1, 2)},
    "tome": {"r": 3},
    "evovit": {"layers": (1,), "head": "class"},
}


@pytest.mark.parametrize("name", LIKE)
def test_counts_are_those_of_the_method(tiny_model, name):
    like = make_reducer(name, **LIKE[name])
    model, variables = tiny_model(Sliced(like=like))
    assert model.schedule == model.clone(reducer=like).schedule
    forward = jax.jit(functools.partial(model.apply, return_info=True))
    _, info = forward(variables, jnp.ones((2, 16, 16, 3)))
    assert info.token_counts == tuple(block.out for block in model.schedule)
    first = min(info.token_counts)
    np.testing.assert_array_equal(info.assign[:, :first], [range(first)] * 2)
