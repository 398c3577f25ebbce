"""Token sets: what a reducer is given and gives back, and the array operations on it.

Every operation works on one image at a time along the leading axis, by stable sorts, batched
gathers and one-hot products: XLA needs no collective for any of them when the batch is sharded
(`lax.top_k` and fancy indexing compile to all-gathers there).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt32

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
            assign=first(shape[1], tokens),
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
        s = self.prefix.shape[1]
        x = jax.lax.platform_dependent(
            self.join(),
            jnp.concatenate([first(s, index), s + index], axis=1),
            tpu=_sequence_selected,
            default=_gathered,
        )
        valid = None if self.valid is None else take(self.valid, index)
        route = inverse(index, self.count)
        state = self.become(x[:, s:], route, take(self.kind, index), valid)
        return state.replace(prefix=x[:, :s])

    def merge(self, groups: Sequence["Merge"], weight: Float[Array, "b n"]) -> "TokenState":
        """Keeps some tokens, averages others into them, and drops the rest.

        Args:
          groups: which; no token is in two of them.
          weight: of each token in an average.

        Returns:
          The state whose tokens are each group's `keep`, in that order; MATCHED where others
          joined.
        """
        s = self.prefix.shape[1]
        x = jax.lax.platform_dependent(
            self.join(),
            weight,
            tuple(groups),
            tpu=functools.partial(_merged_at_once, s),
            default=functools.partial(_merged_by_taking, s),
        )
        merge = functools.reduce(Merge.beside, groups)
        joined = one_hot(merge.into, merge.keep.shape[1], bool).any(axis=1)
        kind = jnp.where(joined, MATCHED, take(self.kind, merge.keep))
        return self.become(x[:, s:], merge.route(self.count), kind).replace(prefix=x[:, :s])

    def append(self, token: Float[Array, "b 1 d"], kind: int) -> "TokenState":
        """Adds a token that stands for no patch."""
        return self.replace(
            tokens=jnp.concatenate([self.tokens, token.astype(self.tokens.dtype)], axis=1),
            size=jnp.pad(self.size, ((0, 0), (0, 1))),
            kind=jnp.pad(self.kind, ((0, 0), (0, 1)), constant_values=kind),
        )


class Merge(NamedTuple):
    """Which of a batch's tokens go on, and which join them; what is in neither is dropped."""

    keep: Int[Array, "b m"]
    gone: Int[Array, "b r"]
    into: Int[Array, "b r"]  # the place in `keep` of the token that each of `gone` joins

    @classmethod
    def all(cls, tokens: Float[Array, "b n d"]) -> "Merge":
        """Every token goes on, in the order they have."""
        nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        return cls(first(tokens.shape[1], tokens), nothing, nothing)

    def route(self, count: int) -> Int[Array, "b n"]:
        """For each of `count` tokens the place in `keep` where it ends, -1 if it is dropped."""
        place = inverse(jnp.concatenate([self.keep, self.gone], axis=1), count)
        end = jnp.concatenate([first(self.keep.shape[1], self.keep), self.into], axis=1)
        return jnp.where(place < 0, -1, take(end, jnp.maximum(place, 0)))

    def beside(self, other: "Merge") -> "Merge":
        """This one and another of the same tokens, as one."""
        return Merge(
            jnp.concatenate([self.keep, other.keep], axis=1),
            jnp.concatenate([self.gone, other.gone], axis=1),
            jnp.concatenate([self.into, self.keep.shape[1] + other.into], axis=1),
        )

    def of(self, order: Int[Array, "b n"]) -> "Merge":
        """The same of the tokens at `order`."""
        index = take(order, jnp.concatenate([self.keep, self.gone], axis=1))
        count = self.keep.shape[1]
        return self._replace(keep=index[:, :count], gone=index[:, count:])


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
    order = jax.lax.platform_dependent(-score, cpu=_order_by_halves, default=_order)
    return order[:, :k]


def _order(x: Float[Array, "b n"]) -> Int[Array, "b n"]:
    return jnp.argsort(x, axis=-1, stable=True)


def _order_by_halves(x: Float[Array, "b n"]) -> Int[Array, "b n"]:
    # XLA's CPU backend sorts plain integers five times as fast as pairs. So: a radix sort, of
    # integers that are made of half a number's bits and the index of the number.
    if x.dtype != jnp.float32 or x.shape[1] > 1 << 16:
        return _order(x)
    # Integers in the order of the numbers: 0 and -0 are equal, whatever is no number comes last.
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    key = jnp.where(jnp.isnan(x), -1, bits ^ ((bits >> 31) | -(1 << 31))).astype(jnp.uint32)
    place = jax.lax.broadcasted_iota(jnp.uint32, key.shape, 1)

    def order(half: UInt32[Array, "b n"]) -> Int[Array, "b n"]:
        return (jnp.sort((half << 16) | place, axis=1, stable=False) & 0xFFFF).astype(jnp.int32)

    by_lower = order(key)
    return _gathered(by_lower, order(_gathered(key, by_lower) >> 16))


def take(values: Array, index: Int[Array, "b k"]) -> Array:
    """`values[b, index[b, k]]` for values of shape [b, n] or [b, n, d].

    As a gather, but on TPUs, which gather slowly, by a one-hot product.
    """
    return jax.lax.platform_dependent(values, index, tpu=_selected, default=_gathered)


def _gathered(values: Array, index: Int[Array, "b k"]) -> Array:
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def _selected(values: Array, index: Int[Array, "b k"]) -> Array:
    chosen = one_hot(index, values.shape[1], values.dtype)
    if values.ndim == 2:
        return (chosen * values[:, None, :]).sum(axis=-1, dtype=values.dtype)
    return weighted_sum(jnp.swapaxes(chosen, 1, 2), values)


def _sequence_selected(x: Float[Array, "b t d"], index: Int[Array, "b k"]) -> Array:
    return _token_major(_selected(x, index))


def _merged_by_taking(
    s: int, x: Float[Array, "b t d"], weight: Float[Array, "b n"], groups: Sequence[Merge]
) -> Float[Array, "b k d"]:
    tokens = x[:, s:]
    merged = [
        join(
            _gathered(tokens, merge.keep),
            _gathered(weight, merge.keep),
            _gathered(tokens, merge.gone),
            _gathered(weight, merge.gone),
            merge.into,
        )
        for merge in groups
    ]
    return jnp.concatenate([x[:, :s], *merged], axis=1)


def _merged_at_once(
    s: int, x: Float[Array, "b t d"], weight: Float[Array, "b n"], groups: Sequence[Merge]
) -> Float[Array, "b k d"]:
    merge = functools.reduce(Merge.beside, groups)
    # TPUs gather slowly and multiply fast. With the prefix in the product the sequence is never
    # taken apart, so it keeps its layout.
    route = merge.route(weight.shape[1])
    route = jnp.concatenate([first(s, route), jnp.where(route < 0, -1, s + route)], axis=1)
    weight = jnp.pad(weight, ((0, 0), (s, 0)), constant_values=1.0)
    return _token_major(average(x, route, weight, s + merge.keep.shape[1]))


def _token_major(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    # The layout in which the TPU's compiler keeps the sequences of so large a batch, and into which
    # it fuses the norms, but which it does not find behind a product by itself.
    large = isinstance(x.shape[0], int) and x.shape[0] >= 128  # no symbol of jax.export
    if not large:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=(1, 0, 2)))


def first(count: int, like: Array) -> Int[Array, "b {count}"]:
    """0, 1, ... `count` - 1 for each image."""
    return jnp.broadcast_to(jnp.arange(count), (like.shape[0], count))


def one_hot(route: Int[Array, "b n"], count: int, dtype: Any = jnp.float32) -> Array:
    """[b, n, count]: 1 where token n goes to slot m. A route of -1 is a row of zeros."""
    return (route[..., None] == jnp.arange(count)).astype(dtype)


def inverse(index: Int[Array, "b k"], count: int) -> Int[Array, "b n"]:
    """Where each of `count` tokens stands in `index`, -1 for those that are not in it."""
    hit: Bool[Array, "b n k"] = index[:, None, :] == jnp.arange(count)[:, None]
    # A sum, which XLA vectorises where an argmax is a loop.
    return (hit * jnp.arange(1, index.shape[1] + 1)).sum(axis=-1) - 1


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
    # The product of the tokens as they are: in bfloat16 it is exact, and one pass of a TPU.
    product = jnp.einsum(
        "bnd,bmd->bnm",
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product * _rate(x)[:, :, None] * _rate(y)[:, None, :]


def _rate(x: Float[Array, "... d"]) -> Float[Array, "..."]:
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.maximum((x * x).sum(-1), 1e-24))


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Vectors of length 1, in float32."""
    return x * _rate(x)[..., None]
