"""The counts of another method with a choice that costs nothing: what a measurement needs.

The time of a model with a method, less the time of the same model with `Sliced` in its place, is
what choosing and merging took. It is no method: it keeps the first tokens, whatever they show.
"""

import dataclasses

import jax.numpy as jnp

from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape, plan
from tdm_jax.reduction.token_state import TokenKind, TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliced(Reducer):
    """Keeps the first tokens, as many as `like` has in each part of each block."""

    like: Reducer

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        return self.like.block_plan(layer, n, shape)

    @property
    def rewrites_prefix(self) -> bool:
        return self.like.rewrites_prefix

    def check(self, shape: ViTShape) -> None:
        self.like.check(shape)

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        return _resize(state, plan(self, context.shape)[context.layer].attention)

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        return _resize(state, plan(self, context.shape)[context.layer].mlp)

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        return _resize(state, plan(self, context.shape)[context.layer].out)


def _resize(state: TokenState, count: int) -> TokenState:
    n = state.count
    if count == n:
        return state
    index = jnp.broadcast_to(jnp.arange(n), (state.tokens.shape[0], n))
    if count < n:
        route = jnp.where(index < count, index, -1)
        return state.replace_tokens(state.tokens[:, :count], route, state.kind[:, :count])
    # A method that brings tokens back has more of them than are left: zeros take their places.
    more = ((0, 0), (0, count - n))
    tokens = jnp.pad(state.tokens, (*more, (0, 0)))
    return state.replace_tokens(
        tokens, index, jnp.pad(state.kind, more, constant_values=TokenKind.KEPT)
    )
