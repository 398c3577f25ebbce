"""PiToMe: Accelerating Transformers with Spectrum-Preserving Token Merging.

Tran et al., NeurIPS 2024 (arXiv 2405.16148). In every block i of L, between attention and MLP,
n patch tokens lose `r = floor(n - n * ratio)`:

1. Similarity C: the cosine of the keys, averaged over heads.
2. Energy of token j: the mean over all l of `elu(C_jl - m_i)` with the margin
   `m_i = 0.75 - 0.75 i / L` (equation 4). It is high in a large group of tokens that are alike,
   such as background, and low for what stands alone; tokens are ranked by it.
3. In the first half of the blocks (`i < ceil(L / 2)`) even ranks are A, odd ones B; each token of A
   finds its most similar one in B, and the r pairs that are most alike merge. What is left of A
   comes first, most alike first, then B by rank.
   In the second half only the first 2r ranks take part, as A and B in turn, and all of A merge; the
   others come first, by rank, then B.

A merged token is the mean of its patches. The authors' image models have no proportional attention.
Prefix tokens take no part. They publish ratios of 0.9, 0.9125, 0.925, 0.95 and 0.975. Their model
for MAE swaps the halves, which is not here.
"""

from tdm_jax.reduction.averages import BySize
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import EnergyMatching
from tdm_jax.reduction.metrics import Keys
from tdm_jax.reduction.schedules import Schedule

PITOME = Composed(
    title="PiToMe",
    schedule=Schedule(layers="all", at_cost_of="ratio"),
    importance=None,
    decoupling=Decoupling(preset="diversity"),
    grouping=EnergyMatching(),
    metric=Keys(),
    average=BySize(),
)
