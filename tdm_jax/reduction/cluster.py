"""The family of methods that turn all tokens into a given number of clusters before a block.

What they share: they stand before blocks 3, 6 and 9 (from 0), their counts go by the number of
patches at the start (`floor(p * keep_rate^i)` after the i-th stage), and no token is dropped.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tdm_jax.ops.gathering import weighted_sum
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights, plan
from tdm_jax.reduction.original_weights import import_stages, stage_name
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenKind, TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterReducer(StageReducer):
    """Replaces the tokens by clusters of them."""

    before: ClassVar[bool] = True
    cumulative: ClassVar[bool] = True


def clustered(
    state: TokenState, tokens: Float[Array, "b m d"], route: Int[Array, "b n"]
) -> TokenState:
    """The state made of clusters: their values, and the cluster that each old token joined."""
    return state.replace_tokens(tokens, route, jnp.full(tokens.shape[:2], TokenKind.CLUSTER))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftClusterReducer(ClusterReducer):
    """Clusters that are learned weighted sums of all tokens.

    For the source map a token belongs to the cluster that takes the largest share of it. A cluster
    may then own no patch at all: its size is 0.
    """

    learned: ClassVar[bool] = True
    # Original names of a stage's weights, and their places (see `import_stages`).
    original: ClassVar[dict[str, str]]

    def pooling(self, clusters: int) -> nn.Module:
        """Maps float32 tokens [b, n, d] to shares [b, n, clusters] and to what they weigh."""
        raise NotImplementedError

    def init(self, key: Array, shape: ViTShape) -> Weights:
        counts, tokens = plan(self, shape), jnp.zeros((1, 1, shape.width))
        return {
            stage_name(stage): self.pooling(counts[layer].out).init(
                jax.random.fold_in(key, stage), tokens
            )["params"]
            for stage, layer in enumerate(self.stages(shape))
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        return import_stages(self, arrays, "cluster_layers", self.original)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        stage = self.stage(context)
        count = self.stage_count(stage, state.count, context.shape)
        pooled: Any = self.pooling(count).apply(
            {"params": context.weights[stage_name(stage)]}, state.tokens.astype(jnp.float32)
        )
        share, values = pooled
        return clustered(state, weighted_sum(share, values), jnp.argmax(share, axis=-1))
