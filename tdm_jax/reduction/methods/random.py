"""Random dropping: the honest baseline that every method should be shown beside.

The counts and places of Top-K, the choice by chance. Each image of a batch has its own draw. With
`rngs={"reducer": key}` the draws follow that key, as in training; without it they follow `seed`, so
that an evaluation is reproducible.
"""

from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.importance import Chance

RANDOM = Composed(
    title="Random",
    importance=Chance(),
    decoupling=Decoupling(preset="importance"),
    grouping=None,
)
