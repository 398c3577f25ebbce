"""Linear maps of tokens."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform, in_reverse_mode


def product(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """`x @ kernel`."""
    # From a float32 answer the gradient's products would have float32 factors.
    half = x.dtype == jnp.bfloat16 and not in_reverse_mode()
    cpu = by_rows_to_float32 if half else by_rows
    return by_platform(x, kernel, reference=by_tokens, cpu=cpu)


def by_tokens(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """As the tokens lie: with rows made of them a TPU would lay large batches out anew."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def by_rows(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """As rows of one matrix (docs/measurements.md, CPU, "all tokens as rows").

    The kernel's gradient then sums over one axis: XLA's CPU backend lays neither factor out anew.
    """
    rows = by_tokens(x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], kernel.shape[1])


def by_rows_to_float32(
    x: Float[Array, "... k"], kernel: Float[Array, "k n"]
) -> Float[Array, "... n"]:
    """Otherwise XLA's CPU backend makes the factors float32 (docs/measurements.md, bfloat16)."""
    rows, dims = x.reshape(-1, x.shape[-1]), (((1,), (0,)), ((), ()))
    y = lax.dot_general(rows, kernel, dims, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[1])
