"""Top-K: keep the tokens that the class token attends to most, drop the others.

The importance-only baseline of "Beyond Attentive Tokens" (Long et al., CVPR 2023, arXiv
2211.11315) and of the token reduction benchmarks. In blocks 3, 6 and 9 (from 0), between attention
and MLP, `ceil(keep_rate * n)` of n tokens stay, ordered by score.
"""

from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling

TOPK = Composed(title="TopK", decoupling=Decoupling(preset="importance"), grouping=None)
