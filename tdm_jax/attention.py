"""Multi-head self-attention that can tell a reducer what it saw without storing its n x n map."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

Dtype = Any


@struct.dataclass
class AttentionView:
    """Queries, keys and values of one block, and what can be asked about them.

    Everything is computed when asked for, in float32, so what no reducer wants costs nothing.
    `dot_product_attention` itself keeps no map.
    """

    q: Float[Array, "b t h k"]
    k: Float[Array, "b t h k"]
    v: Float[Array, "b t h k"]
    bias: Float[Array, "b t"] | None
    prefix: int = struct.field(pytree_node=False)

    def _softmax(self, q: Float[Array, "b q h k"]) -> Float[Array, "b h q t"]:
        scale = self.q.shape[-1] ** -0.5
        logits = jnp.einsum("bqhk,bthk->bhqt", q, self.k, preferred_element_type=jnp.float32)
        logits = logits * scale
        if self.bias is not None:
            logits = logits + self.bias[:, None, None, :]
        return jax.nn.softmax(logits, axis=-1)

    def class_row(self) -> Float[Array, "b h n"]:
        """The class token's softmax over all keys, restricted to the patch tokens: O(n d)."""
        return self._softmax(self.q[:, :1])[:, :, 0, self.prefix :]

    def received(self) -> Float[Array, "b n"]:
        """Attention that each patch token receives, summed over heads and all queries."""
        return self._softmax(self.q).sum(axis=(1, 2))[:, self.prefix :]

    def keys(self) -> Float[Array, "b n h k"]:
        """The patch tokens' keys."""
        return self.k[:, self.prefix :]

    def values(self) -> Float[Array, "b n h k"]:
        """The patch tokens' values."""
        return self.v[:, self.prefix :]


class Attention(nn.Module):
    """Fused-qkv self-attention; parameters `qkv` and `proj`, as timm has them.

    Attributes:
      num_heads: must divide the width.
      prefix: tokens at the front that are no patches.
      dtype: of the computation; parameters and softmax are float32.
    """

    num_heads: int
    prefix: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], key_weight: Float[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], AttentionView]:
        """Attends.

        Args:
          x: normed tokens.
          key_weight: factor of each key in the softmax; None for 1.

        Returns:
          The output and a view of the attention.
        """
        b, t, d = x.shape
        init = nn.initializers.truncated_normal(0.02)
        qkv = nn.Dense(3 * d, dtype=self.dtype, kernel_init=init, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, self.num_heads, -1), 2, 0)
        bias = None
        if key_weight is not None:
            # A weight of 0 must hide a key, yet stay finite where all are hidden.
            bias = jnp.log(jnp.maximum(key_weight.astype(jnp.float32), 1e-30))
        full = None if bias is None else bias[:, None, None, :].astype(q.dtype)
        y = jax.nn.dot_product_attention(q, k, v, bias=full)
        y = nn.Dense(d, dtype=self.dtype, kernel_init=init, name="proj")(y.reshape(b, t, d))
        return y, AttentionView(q, k, v, bias, self.prefix)
