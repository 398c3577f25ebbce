"""Weighted means of tokens: several become one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.ops import gathering
from tdm_jax.ops.gathering import (
    gather_tokens,
    inverse_index,
    leading_indices,
    one_hot,
    weighted_sum,
)
from tdm_jax.ops.layouts import token_major
from tdm_jax.ops.platform import by_platform


class Merge(NamedTuple):
    """Which of a batch's tokens go on, and which join them; what is in neither is dropped."""

    keep: Int[Array, "b m"]
    gone: Int[Array, "b r"]
    into: Int[Array, "b r"]  # the place in `keep` of the token that each of `gone` joins

    @classmethod
    def all(cls, tokens: Float[Array, "b n d"]) -> "Merge":
        """Every token goes on, in the order they have."""
        nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        return cls(leading_indices(tokens.shape[1], tokens), nothing, nothing)

    def route(self, count: int) -> Int[Array, "b n"]:
        """For each of `count` tokens the place in `keep` where it ends, -1 if it is dropped."""
        place = inverse_index(jnp.concatenate([self.keep, self.gone], axis=1), count)
        end = jnp.concatenate([leading_indices(self.keep.shape[1], self.keep), self.into], axis=1)
        return jnp.where(place < 0, -1, gather_tokens(end, jnp.maximum(place, 0)))

    def beside(self, other: "Merge") -> "Merge":
        """This one and another of the same tokens, as one."""
        return Merge(
            jnp.concatenate([self.keep, other.keep], axis=1),
            jnp.concatenate([self.gone, other.gone], axis=1),
            jnp.concatenate([self.into, self.keep.shape[1] + other.into], axis=1),
        )

    def in_order(self) -> "Merge":
        """The same, with what stays in the order in which it stood."""
        order = jnp.argsort(self.keep, axis=1)
        place = inverse_index(order, self.keep.shape[1])
        return Merge(gather_tokens(self.keep, order), self.gone, gather_tokens(place, self.into))

    def of(self, order: Int[Array, "b n"]) -> "Merge":
        """The same of the tokens at `order`."""
        index = gather_tokens(order, jnp.concatenate([self.keep, self.gone], axis=1))
        count = self.keep.shape[1]
        return self._replace(keep=index[:, :count], gone=index[:, count:])


def merge_groups(
    sequence: Float[Array, "b t d"],
    weight: Float[Array, "b n"],
    groups: Sequence[Merge],
    route: Int[Array, "b n"],
) -> Float[Array, "b k d"]:
    """The prefix of a sequence as it is, then each group's `keep` with what joins it.

    Args:
      sequence: prefix and patch tokens.
      weight: of each patch token in an average.
      groups: which patch tokens go on, and which join them.
      route: of all groups side by side, see `Merge.route`.
    """
    return by_platform(sequence, weight, tuple(groups), route, reference=by_index, tpu=by_product)


def by_index(
    sequence: Float[Array, "b t d"],
    weight: Float[Array, "b n"],
    groups: Sequence[Merge],
    route: Int[Array, "b n"],
) -> Float[Array, "b k d"]:
    """Products over those few that merge (docs/measurements.md, CPU, "matched tokens", "apart")."""
    s = sequence.shape[1] - weight.shape[1]
    tokens = sequence[:, s:]
    merged = [
        merge_into(
            gathering.by_index(tokens, merge.keep),
            gathering.by_index(weight, merge.keep),
            gathering.by_index(tokens, merge.gone),
            gathering.by_index(weight, merge.gone),
            merge.into,
        )
        for merge in groups
    ]
    return jnp.concatenate([sequence[:, :s], *merged], axis=1)


def by_product(
    sequence: Float[Array, "b t d"],
    weight: Float[Array, "b n"],
    groups: Sequence[Merge],
    route: Int[Array, "b n"],
) -> Float[Array, "b k d"]:
    """All by one product (docs/measurements.md, TPU, "a stage's new tokens by one product").

    With the prefix in it the sequence is never taken apart, so it keeps its layout.
    """
    s, count = sequence.shape[1] - weight.shape[1], sum(merge.keep.shape[1] for merge in groups)
    route = jnp.where(route < 0, -1, s + route)
    route = jnp.concatenate([leading_indices(s, route), route], axis=1)
    weight = jnp.pad(weight, ((0, 0), (s, 0)), constant_values=1.0)
    return token_major(weighted_mean(sequence, route, weight, s + count))


def weighted_mean(
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


def merge_into(
    tokens: Float[Array, "b m d"],
    weight: Float[Array, "b m"],
    joining: Float[Array, "b r d"],
    joining_weight: Float[Array, "b r"],
    partner: Int[Array, "b r"],
) -> Float[Array, "b m d"]:
    """What `weighted_mean` makes of tokens of which a few join others, at the cost of those few.

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
