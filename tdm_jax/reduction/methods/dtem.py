"""DTEM: Learning to Merge Tokens via Decoupled Embedding (Lee and Hong, NeurIPS 2024).

arXiv 2412.10569. ToMe with a metric of its own: in each block a linear map of what the block's
attention reads, `e = norm1(x) W + b`, as wide as a head, or as two heads in models of 1024 channels
or more. Everything else is ToMe's (see `tome`): between attention and MLP, by the cosine of e, the
size-weighted mean, proportional attention, r tokens in every block, as published 16.

Only the maps are trained, and no gradient reaches the tokens through them. A training step keeps
the shapes fixed and merges softly (`soft_merge`); it is here as a function, the forward pass of a
model in training merges as inference does, where a choice has no gradient.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.ops.gathering import gather_tokens, inverse_index, weighted_sum
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.methods.tome import TOME
from tdm_jax.reduction.metrics import Projection

_ROUNDING = float(np.finfo(np.float32).eps)

DTEM = dataclasses.replace(TOME, title="DTEM", metric=Projection())


class SoftTokens(NamedTuple):
    """Patch tokens of a training step: all stay, those that count most lead.

    Attributes:
      x: their values.
      weight: how many patches each stands for; a fraction once it has merged in part.
    """

    x: Float[Array, "b n d"]
    weight: Float[Array, "b n"]


def soft_merge(
    tokens: SoftTokens, similarity: Float[Array, "b m l"], r: int, alive: int
) -> SoftTokens:
    """One merge of a training step, in which r of the tokens give themselves away.

    Args:
      tokens: the patches; the first `alive` take part, alternating between A and B.
      similarity: of A and B among those.
      r: how much of A merges.
      alive: before the merge; `alive - r` lead after it.

    Returns:
      The tokens by falling weight, and behind them those that took no part.
    """
    x, weight = tokens.x[:, :alive], tokens.weight[:, :alive]
    share = soft_assignment(similarity, r)
    given = share * weight[:, ::2, None]
    received = weight[:, 1::2] + given.sum(axis=1)
    own = (weight[:, 1::2] / received)[..., None].astype(x.dtype)
    b = own * x[:, 1::2] + weighted_sum(given / received[:, None], x[:, ::2])
    rest = 1 - share.sum(axis=2)
    # Straight through: no weight is negative, and the gradient knows of no limit.
    rest += jax.lax.stop_gradient(jnp.clip(rest, 0.0, 1.0) - rest)
    merged = jnp.concatenate([x[:, ::2], b], axis=1)
    left = jnp.concatenate([weight[:, ::2] * rest, received], axis=1)
    order = argtopk(jax.lax.stop_gradient(left), alive)
    return SoftTokens(
        jnp.concatenate([gather_tokens(merged, order), tokens.x[:, alive:]], axis=1),
        jnp.concatenate([gather_tokens(left, order), tokens.weight[:, alive:]], axis=1),
    )


def soft_assignment(
    similarity: Float[Array, "b m l"],
    r: int,
    candidates: int = 3,
    sharpness: float = 0.1,
    temperature: float = 0.1,
) -> Float[Array, "b m l"]:
    """How much of each token of A goes to each of B: r draws without replacement, made soft.

    A draw is a softmax over all edges jointly; a token that has been drawn is less likely to be
    drawn again.

    Args:
      similarity: of A and B.
      r: draws.
      candidates: most similar tokens of B that one of A may go to.
      sharpness: similarities are divided by it (tau 1).
      temperature: of the draws (tau 2).
    """
    b, m, n = similarity.shape
    ranks = inverse_index(
        argtopk(jax.lax.stop_gradient(similarity).reshape(b * m, n), candidates), n
    ).reshape(b, m, n)
    allowed, logit = ranks >= 0, similarity / sharpness
    drawn = jnp.zeros_like(similarity)
    for _ in range(r):
        masked = jnp.where(allowed, logit / temperature, -jnp.inf)
        p = jax.nn.softmax(masked.reshape(b, m * n), axis=-1).reshape(b, m, n)
        drawn += p
        left = jnp.maximum(1 - p.sum(axis=2, keepdims=True), _ROUNDING)
        logit += jnp.log(left)
    total = jnp.maximum(drawn.sum(axis=2, keepdims=True), 1.0)
    return drawn / jax.lax.stop_gradient(total)
