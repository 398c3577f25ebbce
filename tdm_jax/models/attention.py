"""Multi-head self-attention that can tell a reducer what it saw without storing its n x n map."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tdm_jax.models.layers import Dense, init
from tdm_jax.models.rotary import Rotation
from tdm_jax.ops.attention import attend
from tdm_jax.ops.class_row import class_row
from tdm_jax.ops.products import product
from tdm_jax.reduction.contract import AttentionMap, KeyMask

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
    # The first row of q. Taken from q itself it made the TPU compiler lay all of q out for its
    # sake, and store the n x n map.
    class_query: Float[Array, "b h k"]
    bias: Float[Array, "b t"] | None
    prefix: int = struct.field(pytree_node=False)
    # The keys before they were turned, where positions are rotary.
    unturned: Float[Array, "b t h k"] | None = None
    # What the block's attention reads.
    normed: Float[Array, "b t d"] | None = None

    def class_row(self) -> Float[Array, "b h n"]:
        """The class token's softmax over all keys, restricted to the patch tokens: O(n d)."""
        return self._softmax(class_row(self.class_query, self.k))[:, :, self.prefix :]

    def received(self) -> Float[Array, "b n"]:
        """Attention that each patch token receives, summed over heads and all queries."""
        return self.map().sum(axis=(1, 2))[:, self.prefix :]

    def map(self) -> Float[Array, "b h t t"]:
        """Softmax of all queries over all keys, prefix included: O(n^2 d), and the n x n map."""
        logits = jnp.einsum("bqhk,bthk->bhqt", self.q, self.k, preferred_element_type=jnp.float32)
        return self._softmax(logits)

    def _softmax(self, logits: Float[Array, "b h ... t"]) -> Float[Array, "b h ... t"]:
        logits = logits * self.q.shape[-1] ** -0.5
        if self.bias is not None:
            logits = logits + jnp.expand_dims(self.bias, tuple(range(1, logits.ndim - 1)))
        return jax.nn.softmax(logits, axis=-1)

    def keys(self) -> Float[Array, "b n h k"]:
        """The patch tokens' keys: what a token is, without where it stands."""
        return (self.k if self.unturned is None else self.unturned)[:, self.prefix :]

    def values(self) -> Float[Array, "b n h k"]:
        """The patch tokens' values."""
        return self.v[:, self.prefix :]

    def inputs(self) -> Float[Array, "b n d"]:
        """The patch tokens as the attention reads them: behind the block's first norm."""
        assert self.normed is not None
        return self.normed[:, self.prefix :]


def key_bias(key_weight: Float[Array, "b t"] | KeyMask | None) -> Float[Array, "b t"] | None:
    """What a key's factor in the softmax adds to its logits."""
    weight = key_weight.mask if isinstance(key_weight, KeyMask) else key_weight
    # A weight of 0 must hide a key, yet stay finite where all are hidden.
    return None if weight is None else jnp.log(jnp.maximum(weight.astype(jnp.float32), 1e-30))


class QueriesKeysValues(nn.Module):
    """All three, or those that are asked for, by one linear map; some may have no bias.

    Attributes:
      width: channels of a token.
      biased: those that have one, of "qkv", in this order.
      dtype: of the computation.
    """

    width: int
    biased: str = "qkv"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """One kernel and one bias, as timm has them."""
        d = self.width
        self.kernel = self.param("kernel", init, (d, 3 * d))
        if self.biased:
            self.bias = self.param("bias", nn.initializers.zeros, (len(self.biased) * d,))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        parts: str = "qkv",
        update: Float[Array, "d 3*d"] | None = None,
    ) -> Float[Array, "b t p"]:
        """Those of `parts`, neighbours in "qkv", side by side; `update` is added to the kernel."""
        d, own = self.width, self._columns(parts)
        y = product(x.astype(self.dtype), self._kernel(parts, update))
        if not self.biased:
            return y
        bias = self.bias
        if self.biased != "qkv":
            given = dict(zip(self.biased, jnp.split(bias, len(self.biased)), strict=True))
            bias = jnp.concatenate([given.get(part, jnp.zeros(d)) for part in "qkv"])
        if parts != "qkv":
            bias = bias[own]
        return y + bias.astype(self.dtype)

    def question(
        self, q: Float[Array, "b m d"], update: Float[Array, "d 3*d"] | None = None
    ) -> Float[Array, "b m d"]:
        """What tokens themselves are multiplied with, instead of their keys, for the same logits.

        `q . (x W) = (q W^T) . x`. A bias of the keys is left out: it is the same for all of them.
        """
        return jnp.einsum("bmp,dp->bmd", q, self._kernel("k", update))

    def _kernel(self, parts: str, update: Float[Array, "d 3*d"] | None) -> Float[Array, "d p"]:
        kernel = self.kernel if update is None else self.kernel + update
        return (kernel if parts == "qkv" else kernel[:, self._columns(parts)]).astype(self.dtype)

    def _columns(self, parts: str) -> slice:
        first = "qkv".index(parts)
        return slice(first * self.width, (first + len(parts)) * self.width)


class Attention(nn.Module):
    """Fused-qkv self-attention; parameters `qkv` and `proj`, as timm has them.

    Attributes:
      num_heads: must divide the width.
      prefix: tokens at the front that are no patches.
      qkv_bias: which of queries, keys and values have a bias.
      dtype: of the computation; parameters and softmax are float32.
    """

    num_heads: int
    prefix: int
    qkv_bias: str = "qkv"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        key_weight: Float[Array, "b t"] | KeyMask | AttentionMap | None = None,
        rotation: Rotation | None = None,
        update: Float[Array, "d 3*d"] | None = None,
        preview: bool = False,
        read: int | None = None,
    ) -> tuple[Float[Array, "b r d"], AttentionView | None]:
        """Attends.

        Args:
          x: normed tokens.
          key_weight: factor of each key in the softmax, or a mask to learn; None for 1. Or the
            softmax itself.
          rotation: of queries and keys; None for none.
          update: what a method adds to the kernel of queries, keys and values; None for nothing.
          preview: whether to look only: then the output is `x`, and there are no values.
          read: tokens at the front whose output is wanted; None for all. They are no patches.

        Returns:
          The output and a view of the attention; None where the softmax was given, or not all
          outputs are wanted.
        """
        b, t, d = x.shape
        linear = QueriesKeysValues(d, self.qkv_bias, self.dtype, name="qkv")
        if read is not None and not isinstance(key_weight, KeyMask):
            y = self._front(x[:, :read], x, linear, key_weight, rotation, update)
            return Dense(d, dtype=self.dtype, name="proj")(y), None
        if isinstance(key_weight, AttentionMap):
            v = linear(x, "v", update).reshape(b, t, self.num_heads, -1)
            y = jnp.einsum("bhqt,bthk->bqhk", key_weight.map.astype(v.dtype), v)
            return Dense(d, dtype=self.dtype, name="proj")(y.reshape(b, t, d)), None
        if preview:
            both = jnp.split(linear(x, "qk", update), 2, axis=-1)
            q, k = (z.reshape(b, t, self.num_heads, -1) for z in both)
            class_query, unturned = q[:, 0], None
            if rotation is not None:
                q, k, unturned = rotation(q), rotation(k), k
            nothing, bias = jnp.zeros_like(k), key_bias(key_weight)
            view = AttentionView(q, k, nothing, class_query, bias, self.prefix, unturned, x)
            return x, view
        qkv = linear(x, update=update)
        # The gradient of a split is a concatenation; an index's would be three padded sums.
        q, k, v = (z.reshape(b, t, self.num_heads, -1) for z in jnp.split(qkv, 3, axis=-1))
        unturned = None
        if rotation is not None:
            q, k, unturned = rotation(q), rotation(k), k
        bias = key_bias(key_weight)
        if isinstance(key_weight, KeyMask):
            y = masked_attention(q, k, v, key_weight.mask)
        else:
            y = attend(q, k, v, bias, packed=qkv if rotation is None else None)
        y = Dense(d, dtype=self.dtype, name="proj")(y[:, :read].reshape(b, -1, d))
        class_query = qkv[:, 0, :d].reshape(b, self.num_heads, -1)
        return y, AttentionView(q, k, v, class_query, bias, self.prefix, unturned, x)

    def _front(
        self,
        front: Float[Array, "b r d"],
        x: Float[Array, "b t d"],
        linear: QueriesKeysValues,
        key_weight: Float[Array, "b t"] | AttentionMap | None,
        rotation: Rotation | None,
        update: Float[Array, "d 3*d"] | None,
    ) -> Float[Array, "b r d"]:
        """Attention of a few tokens to all, whose values are never made, nor keys if not turned.

        The softmax mixes the tokens, and the values' map, which is linear, follows.
        """
        b, r, d = front.shape
        h = self.num_heads
        if isinstance(key_weight, AttentionMap):
            share = key_weight.map[:, :, :r].swapaxes(1, 2)
        else:
            q = linear(front, "q", update).reshape(b, r, h, -1)
            q = q * q.shape[-1] ** -0.5
            if rotation is None:
                asked = linear.question(_by_head(q).reshape(b, r * h, d), update)
                logits = jnp.einsum("bmd,btd->bmt", asked, x, preferred_element_type=jnp.float32)
                logits = logits.reshape(b, r, h, -1)
            else:
                k = rotation(linear(x, "k", update).reshape(*x.shape[:2], h, -1))
                logits = jnp.einsum("brhk,bthk->brht", q, k, preferred_element_type=jnp.float32)
            bias = key_bias(key_weight)
            share = jax.nn.softmax(logits if bias is None else logits + bias[:, None, None], -1)
        mixed = jnp.einsum("bmt,btd->bmd", share.reshape(b, r * h, -1).astype(x.dtype), x)
        values = linear(mixed, "v", update).reshape(b, r, h, h, -1)
        return jnp.einsum("brhhk->brhk", values).reshape(b, r, d)


def _by_head(q: Float[Array, "b r h k"]) -> Float[Array, "b r h h k"]:
    """Each head's channels among zeros for those of the others."""
    return q[:, :, :, None] * jnp.eye(q.shape[2], dtype=q.dtype)[:, :, None]


def masked_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    mask: Float[Array, "b t"],
    eps: float = 1e-6,
) -> Float[Array, "b t h k"]:
    """Attention under a mask that is being learned (DynamicViT, arXiv 2106.02034, equation 11).

    With `g_ij = mask_j` for j other than i, and 1 for j = i, and t keys:
    `a_ij = (g_ij exp(l_ij) + eps / t) / (sum_j g_ij exp(l_ij) + eps)`. A factor instead of a bias:
    the gradient with respect to a mask of 0 says what showing that key would change. There a hidden
    key counts as no stronger than the strongest that is seen: its logit may lie far above all
    others, and the gradient would be as large as its exponential.
    """
    t = q.shape[1]
    logits = jnp.einsum("bqhk,bthk->bhqt", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    seen = jnp.where(jnp.eye(t, dtype=bool), 1.0, mask.astype(jnp.float32)[:, None, None, :])
    # Shifting changes only how the eps weighs: no gradient needs to know.
    strongest = jnp.where(seen > 0, logits, -jnp.inf).max(axis=-1, keepdims=True)
    logits = logits - jax.lax.stop_gradient(strongest)
    share = jnp.exp(jnp.where(seen > 0, logits, jnp.minimum(logits, 0.0))) * seen
    share = (share + eps / t) / (share.sum(axis=-1, keepdims=True) + eps)
    return jnp.einsum("bhqt,bthk->bqhk", share.astype(v.dtype), v)
