"""The class token's row of the attention, before scale and softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops.platform import by_platform


def class_row(query: Float[Array, "b h k"], keys: Float[Array, "b t h k"]) -> Float[Array, "b h t"]:
    """The products of one query with all keys, head by head, in float32."""
    return by_platform(query, keys, reference=by_heads, tpu=by_channels)


def by_heads(query: Float[Array, "b h k"], keys: Float[Array, "b t h k"]) -> Float[Array, "b h t"]:
    """As the attention lays the keys out (docs/measurements.md, CPU, "the class token's row")."""
    return jnp.einsum("bhk,bthk->bht", query, keys, preferred_element_type=jnp.float32)


def by_channels(
    query: Float[Array, "b h k"], keys: Float[Array, "b t h k"]
) -> Float[Array, "b h t"]:
    """As a TPU's keys lie in memory (docs/measurements.md, TPU, "sums of keys times query").

    The keys are scaled in float32, and a product with ones adds up the channels of each head.
    """
    h, k = query.shape[1:]
    scaled = keys.astype(jnp.float32) * query[:, None].astype(jnp.float32)
    # The ones are exact in any precision.
    return jnp.einsum(
        "btd,dh->bht",
        scaled.reshape(*keys.shape[:2], h * k),
        jnp.repeat(jnp.eye(h), k, axis=0),
        precision=jax.lax.Precision.HIGH,
    )
