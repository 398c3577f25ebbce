"""Token sets: what a reducer is given and gives back, and the array operations on it.

Every operation works on one image at a time along the leading axis, by stable sorts, batched
gathers and one-hot products: XLA needs no collective for any of them when the batch is sharded
(`lax.top_k` and fancy indexing compile to all-gathers there).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# What a token is made of, for pictures and for readers of the source map.
KEPT, MATCHED, CLUSTER, FUSED = 0, 1, 2, 3


@struct.dataclass
class TokenState:
    """The tokens of a batch at one point of the network, and what they stand for.

    Attributes:
      prefix: class, distillation and register tokens; every reducer lets them pass.
      tokens: patch tokens, or what has become of them.
      assign: for each patch of the image the index of the token that stands for it, -1 once it
        has been dropped. A partition: no patch is counted twice.
      size: how many patches each token stands for.
      kind: KEPT, MATCHED (several attentive tokens), CLUSTER (of inattentive ones) or FUSED.
      valid: 1 for a real token, 0 for an empty or masked slot; None where all are real. Float,
        so that the gradient of a straight-through mask can pass.
      last: the value each dropped patch had when it was dropped; None unless asked for.
      carry: what a method hands from one block to the next.
    """

    prefix: Float[Array, "b s d"]
    tokens: Float[Array, "b n d"]
    assign: Int[Array, "b p"]
    size: Float[Array, "b n"]
    kind: Int[Array, "b n"]
    valid: Float[Array, "b n"] | None = None
    last: Float[Array, "b p d"] | None = None
    carry: dict[str, Any] = struct.field(default_factory=dict)

    @classmethod
    def start(
        cls, prefix: Float[Array, "b s d"], tokens: Float[Array, "b n d"], keep_last: bool = False
    ) -> "TokenState":
        """The state before the first block: each token stands for its own patch."""
        shape = tokens.shape[:2]
        return cls(
            prefix=prefix,
            tokens=tokens,
            assign=jnp.broadcast_to(jnp.arange(shape[1]), shape),
            size=jnp.ones(shape, jnp.float32),
            kind=jnp.full(shape, KEPT),
            last=jnp.zeros_like(tokens) if keep_last else None,
        )

    @property
    def count(self) -> int:
        """Patch tokens now."""
        return self.tokens.shape[1]

    def join(self) -> Float[Array, "b t d"]:
        """Prefix and patch tokens as one sequence."""
        return jnp.concatenate([self.prefix, self.tokens], axis=1)

    def split(self, sequence: Float[Array, "b t d"]) -> "TokenState":
        """The inverse of `join`: the same set with new values."""
        s = self.prefix.shape[1]
        return self.replace(prefix=sequence[:, :s], tokens=sequence[:, s:])

    def become(
        self,
        tokens: Float[Array, "b m d"],
        route: Int[Array, "b n"],
        kind: Int[Array, "b m"],
        valid: Float[Array, "b m"] | None = None,
    ) -> "TokenState":
        """Replaces the token set; sizes, source map and last values follow from `route`.

        Args:
          tokens: the new tokens.
          route: for each old token the index of the new one that stands for it, -1 if dropped.
          kind: what each new token is made of.
          valid: 0 for empty slots, None where all are real.
        """
        joined = one_hot(route, tokens.shape[1])  # [b, n, m]
        alive = self.assign >= 0
        moved = take(route, jnp.maximum(self.assign, 0))
        last = self.last
        if last is not None:
            dropped = alive & (moved < 0)
            before = take(self.tokens, jnp.maximum(self.assign, 0))
            last = jnp.where(dropped[..., None], before, last)
        return self.replace(
            tokens=tokens.astype(self.tokens.dtype),
            assign=jnp.where(alive, moved, -1),
            size=jnp.einsum("bn,bnm->bm", self.size, joined),
            kind=kind,
            valid=valid,
            last=last,
        )

    def select(self, index: Int[Array, "b k"]) -> "TokenState":
        """Keeps the tokens at `index`, in that order, and drops the others."""
        route = inverse(index, self.count)
        valid = None if self.valid is None else take(self.valid, index)
        return self.become(take(self.tokens, index), route, take(self.kind, index), valid)

    def merge(
        self,
        route: Int[Array, "b n"],
        weight: Float[Array, "b n"],
        count: int,
        kind: Int[Array, "b m"],
    ) -> "TokenState":
        """Averages the tokens that share a route, each counted with its weight."""
        return self.become(average(self.tokens, route, weight, count), route, kind)


@struct.dataclass
class KeyMask:
    """Keys that a block's attention may look at, such that a gradient also reaches the hidden ones.

    Attributes:
      mask: 1 for a key that all queries see, 0 for one that only its own query sees; over prefix
        and patch tokens. A straight-through mask passes its gradient on.
    """

    mask: Float[Array, "b t"]


def top(score: Float[Array, "b n"], k: int) -> Int[Array, "b k"]:
    """The indices of the k highest scores, best first, ties to the lower index."""
    return jnp.argsort(-score, axis=-1, stable=True)[:, :k]


def take(values: Array, index: Int[Array, "b k"]) -> Array:
    """`values[b, index[b, k]]` for values of shape [b, n] or [b, n, d].

    As a gather, but on TPUs, which gather slowly, floats are taken by a one-hot product.
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return _gathered(values, index)
    return jax.lax.platform_dependent(values, index, tpu=_selected, default=_gathered)


def _gathered(values: Array, index: Int[Array, "b k"]) -> Array:
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def _selected(values: Array, index: Int[Array, "b k"]) -> Array:
    chosen = one_hot(index, values.shape[1], values.dtype)
    if values.ndim == 2:
        return (chosen * values[:, None, :]).sum(axis=-1)
    return weighted_sum(jnp.swapaxes(chosen, 1, 2), values)


def one_hot(route: Int[Array, "b n"], count: int, dtype: Any = jnp.float32) -> Array:
    """[b, n, count]: 1 where token n goes to slot m. A route of -1 is a row of zeros."""
    return (route[..., None] == jnp.arange(count)).astype(dtype)


def inverse(index: Int[Array, "b k"], count: int) -> Int[Array, "b n"]:
    """Where each of `count` tokens stands in `index`, -1 for those that are not in it."""
    hit: Bool[Array, "b n k"] = index[:, None, :] == jnp.arange(count)[:, None]
    return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), -1)


def average(
    tokens: Float[Array, "b n d"],
    route: Int[Array, "b n"],
    weight: Float[Array, "b n"],
    count: int,
) -> Float[Array, "b m d"]:
    """`sum(w_i x_i) / sum(w_i)` over the tokens of each route, by one product.

    The weights are normalised first, in float32, so that a token that is alone comes out as it
    went in.
    """
    share = one_hot(route, count) * _positive(weight)[..., None]  # [b, n, m]
    total = share.sum(axis=1, keepdims=True)
    share = share / jnp.where(total > 0, total, 1.0)
    return weighted_sum(share, tokens)


def join(
    tokens: Float[Array, "b m d"],
    weight: Float[Array, "b m"],
    joining: Float[Array, "b r d"],
    joining_weight: Float[Array, "b r"],
    partner: Int[Array, "b r"],
) -> Float[Array, "b m d"]:
    """What `average` makes of tokens of which a few join others, at the cost of those few.

    Args:
      tokens: those that are joined, or stay alone.
      weight: theirs in an average.
      joining: those that join.
      joining_weight: theirs.
      partner: which of `tokens` each of them joins.
    """
    share = one_hot(partner, tokens.shape[1]) * _positive(joining_weight)[..., None]
    weight = _positive(weight)
    total = weight + share.sum(axis=1)
    own = (weight / total)[..., None].astype(tokens.dtype)
    return own * tokens + weighted_sum(share / total[:, None], joining)


def _positive(weight: Float[Array, "b n"]) -> Float[Array, "b n"]:
    # Attention can underflow to 0; a cluster of nothing but zeros must not become 0 / 0.
    return jnp.maximum(weight.astype(jnp.float32), 1e-18)


def weighted_sum(
    share: Float[Array, "b n m"], tokens: Float[Array, "b n d"]
) -> Float[Array, "b m d"]:
    """`sum_n share[n, m] x[n]`, accumulated in float32, in the tokens' type."""
    # Default precision would round the kept tokens of a float32 model to bfloat16 on a TPU.
    return jnp.einsum(
        "bnm,bnd->bmd",
        share.astype(tokens.dtype),
        tokens,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(tokens.dtype)


def pairwise_distance(
    x: Float[Array, "b n d"], y: Float[Array, "b m d"] | None = None
) -> Float[Array, "b n m"]:
    """Euclidean distances between tokens, in float32, by one product."""
    x = x.astype(jnp.float32)
    y = x if y is None else y.astype(jnp.float32)
    # |x|^2 + |y|^2 - 2xy cancels badly far from the origin: measure from the mean of y.
    middle = jax.lax.stop_gradient(y.mean(axis=1, keepdims=True))
    x, y = x - middle, y - middle
    dot = jnp.einsum("bnd,bmd->bnm", x, y, precision=jax.lax.Precision.HIGHEST)
    squared = (x * x).sum(-1)[:, :, None] + (y * y).sum(-1)[:, None, :] - 2.0 * dot
    # The square root has no gradient at 0, where a token meets itself.
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def nearest(distance: Float[Array, "b n n"], centres: Int[Array, "b m"]) -> Int[Array, "b n"]:
    """For each token which of the centres, which are tokens themselves, is nearest to it.

    A centre joins itself even where another has the same value, so no cluster is empty.
    """
    itself = centres[:, :, None] == jnp.arange(distance.shape[1])
    return jnp.argmin(jnp.where(itself, -1.0, take(distance, centres)), axis=1)


def cosine(x: Float[Array, "b n d"], y: Float[Array, "b m d"]) -> Float[Array, "b n m"]:
    """Cosine similarities in float32."""
    x, y = (unit(z.astype(jnp.float32)) for z in (x, y))
    return jnp.einsum("bnd,bmd->bnm", x, y, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
