"""Attention as one kernel for TPUs: no n x n map, and no change of layout, in memory.

XLA stores the map, and lays queries, keys, values and what comes out anew for it: together two
thirds of a block (docs/measurements.md, TPU, "attention as one kernel"). The kernel reads the
heads where the linear map wrote them, as many as fill a tile of 128 channels at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tdm_jax.ops.platform import batch_mesh

LANES = 128
_LOGITS = 2**18  # of a head at a time: 1 MiB of the chip's fast memory
_GRADIENT = 2**21  # numbers of an image's gradient: 4 MiB of it
_TOKENS = 512  # of short sequences so many at a time: what is read next has to arrive meanwhile


def fits(heads: int, channels: int) -> bool:
    """Whether so many heads of so many channels fill whole tiles."""
    return LANES % channels == 0 and heads * channels % LANES == 0


def fused_attention(
    parts: Sequence[Float[Array, "b t c"]],
    bias: Float[Array, "b t"] | None,
    num_heads: int,
) -> Float[Array, "b t d"]:
    """Softmax attention, the softmax in float32; where there is no TPU, in Pallas's interpreter.

    Args:
      parts: queries, keys and values, the heads of each side by side; or one array, which has them
        side by side.
      bias: added to each key's logits.
      num_heads: must fit, see `fits`.
    """
    biases = () if bias is None else (bias[:, None],)
    count = len(parts)

    def call(*arrays: Array, interpret: bool) -> Array:
        return _call(arrays[:count], arrays[count:], num_heads, interpret)

    return _on_each_device(call, *parts, *biases)


def has_gradient(tokens: int, width: int) -> bool:
    """Whether a whole head's map, and an image's gradient, have room in the chip's fast memory."""
    return tokens**2 <= _LOGITS and tokens * 3 * width <= _GRADIENT


def fused_gradient(
    packed: Float[Array, "b t c"], cotangent: Float[Array, "b t d"], num_heads: int
) -> Float[Array, "b t c"]:
    """The gradient of `fused_attention((packed,), None, num_heads)`, which it computes again.

    Args:
      packed: queries, keys and values side by side; see `has_gradient`.
      cotangent: of the answer.
      num_heads: as there.
    """
    call = functools.partial(_call_gradient, num_heads=num_heads)
    return _on_each_device(call, packed, cotangent)


def _on_each_device(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """Devices that share a batch take their own images each: XLA cannot split a kernel itself.

    The kernel is told whether to `interpret`: where there is no TPU.
    """
    forms = {
        interpret: functools.partial(kernel, interpret=interpret) for interpret in (False, True)
    }

    def call(*arrays: Array) -> Array:
        return jax.lax.platform_dependent(*arrays, tpu=forms[False], default=forms[True])

    mesh = batch_mesh()
    if mesh is None or mesh.size == 1:
        return call(*arrays)
    rows = PartitionSpec(mesh.axis_names)
    split = jax.shard_map(
        call, mesh=mesh, in_specs=(rows,) * len(arrays), out_specs=rows, check_vma=False
    )
    return split(*arrays)


def _call(
    parts: tuple[Array, ...], bias: tuple[Array, ...], num_heads: int, interpret: bool
) -> Array:
    from jax.experimental import pallas as pl  # it takes a while, and TPUs alone need it
    from jax.experimental.pallas import tpu as pltpu

    packed = len(parts) == 1
    b, t, width = parts[0].shape
    d = width // 3 if packed else width
    tiles = d // LANES
    images = next(n for n in range(max(1, _TOKENS // t), 0, -1) if b % n == 0)
    rows = t if t * t <= _LOGITS else max(16, _LOGITS // t // 16 * 16)

    def tile(part: int, size: int, whole: bool) -> Any:
        first = part * tiles if packed else 0
        return pl.BlockSpec(
            (images, size, LANES), lambda i, j, k: (i, 0 if whole else k, first + j)
        )

    kernel = pl.pallas_call(
        functools.partial(_kernel, channels=d // num_heads),
        grid=(b // images, tiles, pl.cdiv(t, rows)),
        in_specs=[
            tile(0, rows, False),
            tile(1, t, True),
            tile(2, t, True),
            *(pl.BlockSpec((images, 1, t), lambda i, j, k: (i, 0, 0)) for _ in bias),
        ],
        out_specs=pl.BlockSpec((images, rows, LANES), lambda i, j, k: (i, k, j)),
        out_shape=jax.ShapeDtypeStruct((b, t, d), parts[0].dtype),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * t * d,
            transcendentals=b * t * t * num_heads,
            bytes_accessed=4 * b * t * d * parts[0].dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="attention",
    )
    return kernel(*(parts * 3 if packed else parts), *bias)


def _kernel(q_ref: Any, k_ref: Any, v_ref: Any, *others: Any, channels: int) -> None:
    """Some images, one tile of heads, some queries, all keys; see `attention.by_products`."""
    *bias_ref, out_ref = others

    def image(i: Array, _: None) -> None:
        heads = []
        for first in range(0, LANES, channels):
            own = slice(first, first + channels)
            q, k, v = (ref[i, :, own] for ref in (q_ref, k_ref, v_ref))
            q = q * jnp.asarray(channels**-0.5, q.dtype)
            logits = jnp.einsum("qk,tk->qt", q, k, preferred_element_type=jnp.float32)
            for ref in bias_ref:
                logits = logits + ref[i]
            share = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            y = jnp.dot(share.astype(v.dtype), v, preferred_element_type=jnp.float32)
            heads.append(y / share.sum(axis=-1, keepdims=True))
        out_ref[i] = jnp.concatenate(heads, axis=-1).astype(out_ref.dtype)

    jax.lax.fori_loop(0, out_ref.shape[0], image, None)


def _call_gradient(packed: Array, cotangent: Array, num_heads: int, interpret: bool) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    b, t, d = cotangent.shape
    tiles = d // LANES

    def tile(part: int) -> Any:
        return pl.BlockSpec((1, t, LANES), lambda i, j: (i, 0, part * tiles + j))

    kernel = pl.pallas_call(
        functools.partial(_gradient_kernel, channels=d // num_heads),
        grid=(b, tiles),
        in_specs=[tile(0), tile(1), tile(2), tile(0)],
        out_specs=pl.BlockSpec((1, t, 3 * d), lambda i, j: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(packed.shape, packed.dtype),
        cost_estimate=pl.CostEstimate(
            flops=10 * b * t * t * d,
            transcendentals=b * t * t * num_heads,
            bytes_accessed=7 * b * t * d * packed.dtype.itemsize,
        ),
        # The tiles of an image fill one block.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="attention_gradient",
    )
    return kernel(packed, packed, packed, cotangent)


def _gradient_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, cotangent_ref: Any, out_ref: Any, *, channels: int
) -> None:
    """One image, one tile of heads."""
    from jax.experimental import pallas as pl

    def product(subscripts: str, x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)

    heads = []
    for first in range(0, LANES, channels):
        own = slice(first, first + channels)
        q, k, v, g = (ref[0, :, own] for ref in (q_ref, k_ref, v_ref, cotangent_ref))
        scale = jnp.asarray(channels**-0.5, q.dtype)
        logits = product("qk,tk->qt", q * scale, k)
        share = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        share = share / share.sum(axis=-1, keepdims=True)
        to_share = product("qk,tk->qt", g, v)
        to_logits = share * (to_share - (share * to_share).sum(axis=-1, keepdims=True))
        to_logits = to_logits.astype(q.dtype)
        heads.append(
            (
                product("qt,tk->qk", to_logits, k) * channels**-0.5,
                product("qt,qk->tk", to_logits, q * scale),
                product("qt,qk->tk", share.astype(g.dtype), g),
            )
        )
    d = out_ref.shape[-1] // 3
    for part, each in enumerate(zip(*heads, strict=True)):
        first = pl.multiple_of(part * d + pl.program_id(1) * LANES, LANES)
        out_ref[0, :, pl.ds(first, LANES)] = jnp.concatenate(each, axis=-1).astype(out_ref.dtype)
