"""Random dropping: the honest baseline that every method should be shown beside.

The counts and places of Top-K, the choice by chance. Each image of a batch has its own draw. With
`rngs={"reducer": key}` the draws follow that key, as in training; without it they follow `seed`, so
that an evaluation is reproducible.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from tdm_jax.reduction.contract import BlockContext
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(PruneReducer):
    """Keeps tokens at random.

    Attributes:
      seed: of the draws, where the caller gives no key.
    """

    seed: int = 0

    def score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        key = context.key
        if key is None:
            key = jax.random.fold_in(jax.random.key(self.seed), context.layer)
        return jax.random.uniform(key, state.tokens.shape[:2])
