"""Clusters that are learned weighted sums of all tokens."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tdm_jax.ops.gathering import weighted_sum
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights, plan
from tdm_jax.reduction.original_weights import import_stages, stage_name
from tdm_jax.reduction.parts import Part
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenKind, TokenState


class Shares(Part):
    """How much of each token goes into each cluster."""

    # Original names of a stage's weights, and their places (see `import_stages`).
    original: ClassVar[dict[str, str]]

    def module(self, clusters: int) -> nn.Module:
        """Maps float32 tokens [b, n, d] to shares [b, n, clusters] and to what they weigh."""
        raise NotImplementedError

    def macs(self, n: int, m: int, shape: ViTShape) -> int:
        """Multiply-adds where n tokens become m."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftClusters(StageReducer):
    """Replaces the tokens, before a block, by weighted sums of all of them.

    For the source map a token belongs to the cluster that takes the largest share of it. A cluster
    may then own no patch at all: its size is 0.

    Attributes:
      title: what error messages call the method.
      shares: of each token in each cluster.
    """

    learned: ClassVar[bool] = True

    title: str = "SoftClusters"  # type: ignore[assignment]
    schedule: Schedule = Schedule(of_image=True)
    shares: Shares = dataclasses.field(default_factory=Shares)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares.validate(self.title)

    @property
    def before(self) -> bool:
        return True

    def init(self, key: Array, shape: ViTShape) -> Weights:
        counts, tokens = plan(self, shape), jnp.zeros((1, 1, shape.width))
        return {
            stage_name(stage): self.shares.module(counts[layer].out).init(
                jax.random.fold_in(key, stage), tokens
            )["params"]
            for stage, layer in enumerate(self.stages(shape))
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        return import_stages(self, arrays, "cluster_layers", self.shares.original)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        m = self.block_plan(layer, n, shape).out
        return self.shares.macs(n, m, shape) if m < n else 0

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        stage = self.stage(context)
        count = self.stage_count(stage, state.count, context.shape)
        module: Any = self.shares.module(count)
        share, values = module.apply(
            {"params": context.weights[stage_name(stage)]}, state.tokens.astype(jnp.float32)
        )
        kind = jnp.full((share.shape[0], count), TokenKind.CLUSTER)
        return state.replace_tokens(weighted_sum(share, values), jnp.argmax(share, axis=-1), kind)
