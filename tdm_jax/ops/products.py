"""Linear maps of tokens."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform


def product(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """`x @ kernel`."""
    return by_platform(x, kernel, reference=by_tokens, cpu=by_rows)


def by_tokens(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """As the tokens lie: with rows made of them a TPU would lay large batches out anew."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def by_rows(x: Float[Array, "... k"], kernel: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """As rows of one matrix (docs/measurements.md, CPU, "all tokens as rows").

    The kernel's gradient then sums over one axis: XLA's CPU backend lays neither factor out anew.
    It multiplies in bfloat16 only what may be float32 behind it (docs/measurements.md, bfloat16).
    """
    rows, exact = x.reshape(-1, x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
    y = lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), preferred_element_type=exact)
    return y.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[1])
