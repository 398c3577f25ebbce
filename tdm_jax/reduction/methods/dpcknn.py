"""DPC-KNN: density-peak clustering with k nearest neighbours, TCFormer's token merging.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022 (arXiv 2204.08680), equations 1 to 4, after Du et al., 2016; as the token
reduction benchmarks use it in a plain transformer. Before blocks 3, 6 and 9 (from 0) the tokens
become `floor(p * keep_rate^i)` clusters (see `density_peaks`, k = 5), each the mean of its members:
every token counts once, however many patches it stands for. TCFormer itself weighs each token by
the exponential of a learned score (equation 4): `"dpcknn_score"`.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.errors import unknown
from tdm_jax.reduction.cluster import ClusterReducer
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights, require
from tdm_jax.reduction.density_peaks import density_peaks, density_peaks_macs
from tdm_jax.reduction.original_weights import import_stages, stage_name
from tdm_jax.reduction.token_state import TokenKind, TokenState

WEIGHTS = ("uniform", "size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPCKNN(ClusterReducer):
    """Clusters the tokens by density peaks.

    Attributes:
      neighbors: nearest tokens that make a density, itself included.
      weight: of each token in its cluster's mean: "uniform", or "size" for the mean over patches.
    """

    neighbors: int = 5
    weight: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "neighbors", self.neighbors >= 1, "be at least 1")
        if self.weight not in WEIGHTS:
            raise unknown("DPCKNN weight", self.weight, WEIGHTS)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        return density_peaks_macs(n, shape.width) if self.acts(layer, n, shape) else 0

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        count = self.stage_count(self.stage(context), state.count, context.shape)
        peaks = density_peaks(state.tokens, count, self.neighbors)
        merged = state.merge([peaks], self.weigh(state, context))
        return merged.replace(kind=jnp.full_like(merged.kind, TokenKind.CLUSTER))

    def weigh(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        """Each token's weight in the mean of its cluster."""
        return state.size if self.weight == "size" else jnp.ones_like(state.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredDPCKNN(DPCKNN):
    """Weighs each token by `exp(w x + b)`, times what `weight` says."""

    learned: ClassVar[bool] = True

    def init(self, key: Array, shape: ViTShape) -> Weights:
        draw = nn.initializers.lecun_normal()
        return {
            stage_name(stage): {
                "kernel": draw(jax.random.fold_in(key, stage), (shape.width, 1)),
                "bias": jnp.zeros(1),
            }
            for stage in range(len(self.stages(shape)))
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        names = {"score.weight": "kernel", "score.bias": "bias"}
        return import_stages(self, arrays, "cluster_layers", names)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        own = n * shape.width if self.acts(layer, n, shape) else 0
        return own + super().macs(layer, n, shape)

    def weigh(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        score = context.weights[stage_name(self.stage(context))]
        logit = (state.tokens.astype(jnp.float32) @ score["kernel"] + score["bias"])[..., 0]
        # A factor that all tokens share leaves every mean as it is.
        logit = logit - jax.lax.stop_gradient(logit.max(axis=-1, keepdims=True))
        return jnp.exp(logit) * super().weigh(state, context)
