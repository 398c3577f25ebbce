"""Softmax attention of all queries to all keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops import pallas_attention
from tdm_jax.ops.platform import (
    by_platform,
    in_reverse_mode,
    is_portable,
    may_hold_tpu_kernels,
)

_ROWS = 256  # queries that a CPU's fused attention takes at its full speed


def attend(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    bias: Float[Array, "b t"] | None = None,
    packed: Float[Array, "b t c"] | None = None,
) -> Float[Array, "b t h k"]:
    """Softmax attention, `bias` added to each key's logits; the softmax is float32's.

    On NVIDIA GPUs, in half precision and without a bias, by cuDNN's fused kernel; on TPUs, in
    bfloat16, by one of our own.

    Args:
      q: queries.
      k: keys.
      v: values.
      bias: of each key.
      packed: the array that `q`, `k` and `v` are the thirds of, if there is one.
    """
    if _has_tpu_kernel(q):
        b, t, h, _ = q.shape
        parts = (q, k, v) if packed is None else (packed,)
        if not in_reverse_mode():
            y = by_tpu_kernel(tuple(x.reshape(b, t, -1) for x in parts), bias, h)
            return y.reshape(q.shape)
        if packed is not None and bias is None and pallas_attention.has_gradient(t, q[0, 0].size):
            return by_tpu_kernel_backward(packed, h).reshape(q.shape)
    forms: dict[str, Callable[..., Array]] = {}
    if q.dtype == jnp.bfloat16 and not in_reverse_mode():
        forms["cpu"] = _by_blocks_of_heads
    elif q.shape[1] > _ROWS:
        forms["cpu"] = by_blocks
    if bias is None and not is_portable() and _has_cudnn_kernel(q):
        forms["cuda"] = by_cudnn_backward if in_reverse_mode() else by_cudnn
    if not forms:
        return by_products(q, k, v, bias)
    biased = () if bias is None else (bias,)
    return by_platform(q, k, v, *biased, reference=by_products, **forms)


def _has_tpu_kernel(q: Float[Array, "b t h k"]) -> bool:
    sized = isinstance(q.shape[0], int)  # no symbol of jax.export
    ours = may_hold_tpu_kernels() and sized
    return ours and q.dtype == jnp.bfloat16 and pallas_attention.fits(*q.shape[2:])


def _has_cudnn_kernel(q: Float[Array, "b t h k"]) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and _on_ampere()


def _on_ampere() -> bool:
    # Asked while tracing: without such a device the kernel cannot even be traced.
    backend = jax.extend.backend.get_backend()
    if "cuda" not in backend.platform_version:
        return False
    return float(backend.local_devices()[0].compute_capability) >= 8


def by_products(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    bias: Float[Array, "b t"] | None = None,
) -> Float[Array, "b n h k"]:
    """Heads before tokens (docs/measurements.md, CPU, "heads before tokens", "dividing by")."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    bias = None if bias is None else bias[:, None, None]
    return jnp.swapaxes(_by_products(q, k, v, bias, v.dtype), 1, 2)


def by_heads(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    bias: Float[Array, "b t"] | None = None,
) -> Float[Array, "b n h k"]:
    """Images and heads as one axis (docs/measurements.md, bfloat16, on a CPU)."""
    b, n, h, d = q.shape
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(b * h, x.shape[1], d) for x in (q, k, v))
    bias = None if bias is None else jnp.repeat(bias, h, axis=0)[:, None]
    return jnp.swapaxes(_by_products(q, k, v, bias, jnp.float32).reshape(b, h, n, d), 1, 2)


def _by_products(
    q: Float[Array, "... n k"],
    k: Float[Array, "... t k"],
    v: Float[Array, "... t k"],
    bias: Float[Array, "... t"] | None,
    accumulator: Any,
) -> Float[Array, "... n k"]:
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("...qk,...tk->...qt", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    share = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    # In the values' type: so are the products of its gradient. Dividing after it instead of in the
    # softmax saves a pass over the n x n numbers.
    share, total = share.astype(v.dtype), share.sum(axis=-1, keepdims=True)
    y = jnp.einsum("...qt,...tk->...qk", share, v, preferred_element_type=accumulator)
    return (y.astype(jnp.float32) / total).astype(v.dtype)


def by_blocks(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    bias: Float[Array, "b t"] | None = None,
    some: Callable[..., Array] = by_products,
) -> Float[Array, "b t h k"]:
    """A part of the queries at a time (docs/measurements.md, CPU, "at most 256 queries")."""
    rows = -(-q.shape[1] // -(-q.shape[1] // _ROWS))  # even parts, as few as will do
    parts = [q[:, i : i + rows] for i in range(0, q.shape[1], rows)]
    return jnp.concatenate([some(part, k, v, bias) for part in parts], axis=1)


# One function for all blocks, so that JAX traces it once.
_by_blocks_of_heads = functools.partial(by_blocks, some=by_heads)

_kernel = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@jax.custom_jvp
def by_cudnn(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"]
) -> Float[Array, "b t h k"]:
    """No n x n map in memory (docs/measurements.md, GPU); differentiates as `by_products` does."""
    return _kernel(q, k, v)


@by_cudnn.defjvp
def _by_cudnn_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"]]:
    # cuDNN has no forward mode. Checkpointed, a backward pass holds the map of one block at a time.
    _, tangent = jax.jvp(jax.checkpoint(by_products), primals, tangents)
    return by_cudnn(*primals), tangent


@jax.custom_vjp
def by_cudnn_backward(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"]
) -> Float[Array, "b t h k"]:
    """No map in the backward pass either (docs/measurements.md, GPU), but no forward mode."""
    return _kernel(q, k, v)


def _by_cudnn_forward(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"]
) -> tuple[Float[Array, "b t h k"], Callable]:
    t = q.shape[1]

    def even(*qkv: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        # JAX refuses to differentiate the kernel at an odd number of tokens: add one and hide it.
        qkv = [jnp.pad(x, ((0, 0), (0, t % 2), (0, 0), (0, 0))) for x in qkv]
        length = jnp.full(q.shape[0], t, jnp.int32) if t % 2 else None
        return _kernel(*qkv, query_seq_lengths=length, key_value_seq_lengths=length)[:, :t]

    return jax.vjp(even, q, k, v)


by_cudnn_backward.defvjp(_by_cudnn_forward, lambda backward, cotangent: backward(cotangent))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def by_tpu_kernel(
    parts: tuple[Float[Array, "b t c"], ...], bias: Float[Array, "b t"] | None, num_heads: int
) -> Float[Array, "b t d"]:
    """No n x n map in memory (docs/measurements.md, TPU, "attention as one kernel").

    It differentiates as `by_products` does, whose parts `parts` are side by side, or apart.
    """
    return pallas_attention.fused_attention(parts, bias, num_heads)


@by_tpu_kernel.defjvp
def _by_tpu_kernel_jvp(
    num_heads: int, primals: tuple, tangents: tuple
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    @jax.checkpoint
    def plain(parts: tuple[Array, ...], bias: Array | None) -> Array:
        q, k, v = parts if len(parts) == 3 else jnp.split(parts[0], 3, axis=-1)
        q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q, k, v))
        y = by_products(q, k, v, bias)
        return y.reshape(*y.shape[:2], -1)

    _, tangent = jax.jvp(plain, primals, tangents)
    return by_tpu_kernel(*primals, num_heads), tangent


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def by_tpu_kernel_backward(packed: Float[Array, "b t c"], num_heads: int) -> Float[Array, "b t d"]:
    """No map in the backward pass either, but no forward mode."""
    return pallas_attention.fused_attention((packed,), None, num_heads)


by_tpu_kernel_backward.defvjp(
    lambda packed, num_heads: (by_tpu_kernel_backward(packed, num_heads), packed),
    lambda num_heads, packed, cotangent: (
        pallas_attention.fused_gradient(packed, cotangent, num_heads),
    ),
)
