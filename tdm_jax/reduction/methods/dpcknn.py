"""DPC-KNN: density-peak clustering with k nearest neighbours, TCFormer's token merging.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer", CVPR 2022 (arXiv 2204.08680), equations 1 to 4, after Du et al., 2016; as the token
reduction benchmarks use it in a plain transformer. Before blocks 3, 6 and 9 (from 0) the tokens
become `floor(p * keep_rate^i)` clusters (see `density_peaks`, k = 5), each the mean of its members:
every token counts once, however many patches it stands for. TCFormer itself weighs each token by
the exponential of a learned score (equation 4): `"dpcknn_score"`.
"""

import dataclasses

from tdm_jax.reduction.averages import Scored, Uniform
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import DensityPeaks
from tdm_jax.reduction.schedules import Schedule

DPCKNN = Composed(
    title="DPCKNN",
    schedule=Schedule(of_image=True),
    place="before",
    importance=None,
    decoupling=Decoupling(preset="diversity"),
    grouping=DensityPeaks(neighbors=5),
    average=Uniform(),
)
SCORED_DPCKNN = dataclasses.replace(DPCKNN, title="ScoredDPCKNN", average=Scored())
