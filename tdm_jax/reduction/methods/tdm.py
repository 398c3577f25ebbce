"""TDM: token decoupling and merging (Long et al., CVPR 2023, arXiv 2211.11315).

In blocks 3, 6 and 9 (from 0), between attention and MLP, class attention decouples the tokens into
attentive and inattentive ones (`decoupling`). The inattentive are clustered by density peaks, so
that what is dropped elsewhere stays represented; the attentive are merged in homogeneous pairs;
optionally EViT's fused token is added. A new token is `sum(a_i z_i) / sum(a_i)` over its members,
by their class attention.

`preset="frozen"` is the point of the space that keeps most of a network that is used as it is,
without training (docs/methods.md has the ablation).
"""

import dataclasses

from tdm_jax.reduction.averages import BySize
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.metrics import UnitTokens

TDM = Composed()

FROZEN = dataclasses.replace(
    TDM,
    decoupling=Decoupling(preset="frozen"),
    metric=UnitTokens(),
    average=BySize(),
    proportional_attention=True,
)
