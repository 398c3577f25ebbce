"""DPC-KNN: density-peak clustering with k nearest neighbours, TCFormer's token merging.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022 (arXiv 2204.08680), equations 1 to 4, after Du et al., 2016; as the token
reduction benchmarks use it in a plain transformer. Before blocks 3, 6 and 9 (from 0) the tokens
become `floor(p * keep_rate^i)` clusters (see `density_peaks`, k = 5), each the mean of its members:
every token counts once, however many patches it stands for.
"""

import dataclasses

import jax.numpy as jnp

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.base import Attention, Step, ViTShape
from tdm_jax.reduction.cluster import ClusterReducer, clustered
from tdm_jax.reduction.density_peaks import density_peaks, density_peaks_macs
from tdm_jax.tokens import TokenState, average

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
        if self.neighbors < 1:
            raise InputError(f"DPCKNN: neighbors must be at least 1; got {self.neighbors}")
        if self.weight not in WEIGHTS:
            raise unknown("DPCKNN weight", self.weight, WEIGHTS)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        return density_peaks_macs(n, shape.width) if self.acts(layer, n, shape) else 0

    def reduce(self, state: TokenState, step: Step, attention: Attention | None) -> TokenState:
        del attention
        count = self.stage_count(self.stage(step), state.count, step.shape)
        route = density_peaks(state.tokens, count, self.neighbors)
        weight = state.size if self.weight == "size" else jnp.ones_like(state.size)
        return clustered(state, average(state.tokens, route, weight, count), route)
