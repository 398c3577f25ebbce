"""TDM: token decoupling and merging (Long et al., CVPR 2023, arXiv 2211.11315).

In blocks 3, 6 and 9 (from 0), between attention and MLP, class attention decouples the tokens into
attentive and inattentive ones (`decoupling`). The inattentive are clustered by density peaks, so
that what is dropped elsewhere stays represented; the attentive are merged in homogeneous pairs;
optionally EViT's fused token is added. A new token is `sum(a_i z_i) / sum(a_i)` over its members,
by their class attention.

`preset="frozen"` is the point of the space that keeps most of a network that is used as it is,
without training (docs/methods.md has the ablation).
"""

from tdm_jax.reduction.averages import ByBoth
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import Bipartite
from tdm_jax.reduction.schedules import Schedule

TDM = Composed()

FROZEN = Composed(
    schedule=Schedule(layers="gradual", at_cost_of="r"),
    decoupling=Decoupling(preset="frozen"),
    grouping=Bipartite(size_power=0.5, score_power=0.2, one_sided=0.5),
    average=ByBoth(score_weight=0.5),
    proportional_attention=0.95,
)
