"""From the tokens that leave the last block to one vector for each image."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tdm_jax.models.layers import Dense, LayerNorm, Mlp, init
from tdm_jax.ops.class_row import class_row
from tdm_jax.ops.gathering import weighted_sum
from tdm_jax.ops.normalisation import layer_norm
from tdm_jax.reduction.token_state import TokenState

Dtype = Any
POOLS = ("token", "avg", "map", "token_avg")


def mean_patch(features: Float[Array, "b t d"], state: TokenState) -> Float[Array, "b d"]:
    """The mean over patches, not tokens: a token counts as often as it stands for one."""
    size = state.size if state.valid is None else state.size * state.valid
    # A mask drawn in training may hide all of them.
    share = size / jnp.maximum(size.sum(axis=-1, keepdims=True), 1)
    return weighted_sum(share[..., None], features[:, state.prefix.shape[1] :])[:, 0]


class AttentionPool(nn.Module):
    """Attention of one learned query to all tokens, then an MLP (SigLIP, arXiv 2303.15343).

    Attributes:
      num_heads: must divide the width.
      mlp_hidden: channels between the MLP's two maps.
      activation: of the MLP.
      layer_norm_eps: of the norm before the MLP.
      dtype: of the computation.
    """

    num_heads: int
    mlp_hidden: int
    activation: str
    layer_norm_eps: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b d"]:
        """Pools.

        Args:
          x: normed tokens.
          bias: added to each key's logits.
        """
        b, t, d = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return Dense(features, dtype=self.dtype, name=name)

        latent = self.param("latent", init, (1, 1, d)).astype(self.dtype)
        query = dense(d, "q")(latent).reshape(self.num_heads, -1)
        keys, values = (
            z.reshape(b, t, self.num_heads, -1)
            for z in jnp.split(dense(2 * d, "kv")(x), 2, axis=-1)
        )
        query = jnp.broadcast_to(query * query.shape[-1] ** -0.5, (b, *query.shape))
        logits = class_row(query, keys)
        if bias is not None:
            logits = logits + bias[:, None]
        share = jax.nn.softmax(logits, axis=-1)
        y = jnp.einsum("bht,bthk->bhk", share.astype(values.dtype), values)
        y = dense(d, "proj")(y.reshape(b, 1, d))
        norm = LayerNorm(self.layer_norm_eps, self.dtype, name="norm")
        mlp = Mlp(self.mlp_hidden, self.activation, dtype=self.dtype, name="mlp")
        return (y + mlp(norm(y)))[:, 0]


class PoolingQuery(struct.PyTreeNode):
    """What the pooling head would attend to among tokens that have not reached it yet.

    The query and the keys' map are one matrix, so a question costs n d h multiply-adds.

    Attributes:
      weights: from normed tokens to the logits of each head.
      epsilon: of the norm.
    """

    weights: Float[Array, "d h"]
    epsilon: float = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, norm: Mapping[str, Array], pool: Mapping[str, Any], num_heads: int, epsilon: float
    ) -> "PoolingQuery":
        """From the parameters of the final norm and of the head."""
        query = pool["latent"][0, 0] @ pool["q"]["kernel"] + pool["q"]["bias"]
        d = query.shape[0]
        keys = pool["kv"]["kernel"][:, :d].reshape(d, num_heads, -1)
        weights = jnp.einsum("dhk,hk->dh", keys, query.reshape(num_heads, -1))
        return cls(weights * norm["scale"][:, None] * keys.shape[-1] ** -0.5, epsilon)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b h n"]:
        """The softmax over the tokens, in float32. The biases are the same for all tokens."""
        ones = jnp.ones(tokens.shape[-1])
        normed = layer_norm(tokens, ones, jnp.zeros_like(ones), self.epsilon)
        logits = jnp.einsum("bnd,dh->bhn", normed.astype(jnp.float32), self.weights)
        return jax.nn.softmax(logits, axis=-1)
