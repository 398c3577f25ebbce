"""ToMe: Token Merging, Your ViT But Faster (Bolya et al., ICLR 2023, arXiv 2210.09461).

In every block, between attention and MLP, r tokens are merged into others that are alike:

1. All tokens alternate by position, the prefix counted: even positions are A, odd ones B.
2. Each patch token of A finds its most similar one in B: cosine of the keys, averaged over heads.
3. The r pairs that are most alike merge, at most half of the tokens; a token of B may take several.
   A merged token is the mean of its patches: `sum(s_i x_i) / sum(s_i)` with sizes s.
4. What is left of A stands before B, both in order of position.

Prefix tokens neither merge nor are merged into. With proportional attention each key's logit gets
`log(s)` added (equation 1): off the shelf the method needs it, a model trained with ToMe may do
without.

The authors set r by hand (13 in DeiT-S at 224 pixels). A single keep rate, as other methods have
it, becomes the constant r that costs about the same, see `schedules.at_equal_cost`.
"""

from tdm_jax.reduction.averages import BySize
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import Bipartite
from tdm_jax.reduction.metrics import Keys
from tdm_jax.reduction.schedules import Schedule

TOME = Composed(
    title="ToMe",
    schedule=Schedule(layers="all", at_cost_of="r"),
    importance=None,
    decoupling=Decoupling(preset="diversity"),
    grouping=Bipartite(),
    metric=Keys(),
    average=BySize(),
    proportional_attention=True,
)
