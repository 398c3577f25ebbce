"""DTEM: Learning to Merge Tokens via Decoupled Embedding (Lee and Hong, NeurIPS 2024).

arXiv 2412.10569. ToMe with a metric of its own: in each block a linear map of what the block's
attention reads, `e = norm1(x) W + b`, as wide as a head, or as two heads in models of 1024 channels
or more. Everything else is ToMe's (see `tome`): between attention and MLP, by the cosine of e, the
size-weighted mean, proportional attention, r tokens in every block, as published 16.

Only the maps are trained (`optim.only`), and no gradient reaches the tokens through them. In
training all tokens stay and a stage merges softly (`soft_merge`): those of A give themselves to
those of B in shares, all are sorted by what they still stand for, and from stage to stage fewer of
the first take part, as many as inference would have left.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, weighted_sum
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext
from tdm_jax.reduction.methods.tome import TOME
from tdm_jax.reduction.metrics import Projection
from tdm_jax.reduction.token_state import TokenState

_ROUNDING = float(np.finfo(np.float32).eps)

# A token that has given all away hides from the attention without a logarithm of nothing.
_NOTHING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dtem(Composed):
    """ToMe by a learned projection, which learns by merging softly."""

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        if not context.train:
            return super().reduce(state, context)
        stage, alive, shape = self.stage(context), context.shape.patches, context.shape
        for earlier in range(stage):
            alive = self.stage_count(earlier, alive, shape)
        r = alive - self.stage_count(stage, alive, shape)
        vectors = self.metric.of_all(state, context, self._weights(stage, context))
        similarity = cosine_similarity(vectors[:, :alive:2], vectors[:, 1:alive:2])
        after = soft_merge(SoftTokens(state.tokens, state.size), similarity, r, alive)
        order: Any = after.order
        # A patch is said to be where its token stands, even if little of it is left there.
        route = inverse_index(order, state.count)
        ranked = state.replace_tokens(after.x, route, gather_tokens(state.kind, order))
        return ranked.replace(size=jnp.maximum(after.weight, _NOTHING))


DTEM = Dtem(**{field.name: getattr(TOME, field.name) for field in dataclasses.fields(TOME)})
DTEM = dataclasses.replace(DTEM, title="DTEM", metric=Projection())


class SoftTokens(NamedTuple):
    """Patch tokens of a training step: all stay, those that count most lead.

    Attributes:
      x: their values.
      weight: how many patches each stands for; a fraction once it has merged in part.
      order: where each stood before the merge; None before there was one.
    """

    x: Float[Array, "b n d"]
    weight: Float[Array, "b n"]
    order: Int[Array, "b n"] | None = None


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
    places = jnp.concatenate([jnp.arange(0, alive, 2), jnp.arange(1, alive, 2)])
    behind = jnp.broadcast_to(jnp.arange(alive, tokens.x.shape[1]), tokens.weight[:, alive:].shape)
    return SoftTokens(
        jnp.concatenate([gather_tokens(merged, order), tokens.x[:, alive:]], axis=1),
        jnp.concatenate([gather_tokens(left, order), tokens.weight[:, alive:]], axis=1),
        jnp.concatenate([places[order], behind], axis=1),
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
