"""cuDNN's kernel and its padding, with JAX's plain form of the same function in its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax.ops import attention
from tdm_jax.ops.attention import attend, by_products
from tdm_jax.ops.platform import pinned, reverse_mode


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Lengths of the sequences that the kernel was traced with."""
    lengths = []

    def plain(q, *args, **kwargs):
        lengths.append(q.shape[1])
        return jax.nn.dot_product_attention(q, *args, implementation="xla", **kwargs)

    monkeypatch.setattr(attention, "_kernel", plain)
    monkeypatch.setattr(attention, "_on_ampere", lambda: True)
    return lengths


def draw(tokens, dtype=jnp.float16):
    return tuple(jax.random.normal(jax.random.key(0), (3, 2, tokens, 2, 8), dtype))


def backward(function, *qkv):
    """An answer and the gradients of something of it."""
    return jax.value_and_grad(lambda *qkv: jnp.sin(function(*qkv)).sum(), argnums=(0, 1, 2))(*qkv)


def agree(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.02), ours, theirs)


@pytest.mark.parametrize("tokens", [6, 7])
def test_its_own_backward_pass_sees_an_even_number_of_tokens(kernel, tokens):
    qkv = draw(tokens)
    expected = backward(by_products, *qkv)
    with pinned("cuda"), reverse_mode():
        agree(backward(attend, *qkv), expected)
        assert kernel == [tokens + tokens % 2]
        with pytest.raises(TypeError, match="jvp"):
            jax.jvp(attend, qkv, qkv)


def test_without_the_switch_it_differentiates_both_ways(kernel):
    qkv, tangents = draw(7), draw(7)[::-1]
    with pinned("cuda"):
        agree(backward(attend, *qkv), backward(by_products, *qkv))
        agree(jax.jvp(attend, qkv, tangents), jax.jvp(by_products, qkv, tangents))
        agree(
            jax.vmap(functools.partial(backward, attend))(*(x[:, None] for x in qkv)),
            jax.vmap(functools.partial(backward, by_products))(*(x[:, None] for x in qkv)),
        )
        jax.jvp(jax.grad(lambda q: attend(q, *qkv[1:]).sum()), qkv[:1], tangents[:1])
    assert set(kernel) == {7}


@pytest.mark.parametrize(("dtype", "bias"), [(jnp.float32, None), (jnp.float16, jnp.zeros((2, 7)))])
def test_float32_and_weighted_keys_have_none(kernel, dtype, bias):
    with pinned("cuda"):
        attend(*draw(7, dtype), bias)
    assert not kernel
