"""A layer norm on CPUs, where it is long, and of what is no number.

Its values and gradients are tested with the layers (tests/models/test_layers.py).
"""

import jax
import jax.numpy as jnp
import pytest

from tdm_jax.ops.normalisation import layer_norm


@pytest.mark.parametrize("tokens", [64, 4096, 5000])
def test_a_cpu_norms_once_before_a_product(tokens):
    x, kernel = jnp.ones((tokens, 64)), jnp.ones((64, 128))
    scale, bias = jnp.ones(64), jnp.zeros(64)

    def program(x):
        return layer_norm(x, scale, bias, 1e-6) @ kernel

    text = jax.jit(program).lower(x).compile().as_text()
    assert "rsqrt" in text and "dot(" in text
    fused = [part for part in text.split("\n\n") if "rsqrt" in part and "dot(" in part]
    assert not fused


def test_what_is_no_number_stays_so():
    x = jnp.ones((4097, 4)).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf)
    y = layer_norm(x, jnp.ones(4), jnp.zeros(4), 1e-6)
    assert jnp.isnan(y[:2]).all() and not y[2:].any()
