"""ATC: Agglomerative Token Clustering (Haurum et al., ECCV 2024, arXiv 2409.11923).

In blocks 3, 6 and 9 (from 0), between attention and MLP, the patch tokens are clustered bottom up:
the two clusters that are closest become one, until `floor(p * keep_rate^i)` are left. Tokens are
`1 - cos` apart, of their keys averaged over heads; clusters are apart as their closest tokens are
("single"), their farthest ("complete"), or all pairs of them on average ("average"), each current
token counted once. A cluster is the mean of its patches, and stands where its first token stood.

The authors use proportional attention; without it a mean takes each token once. Off the shelf they
remove r tokens in every block, `layers="all"`, and count the class token twice: their r is one more
than ours.

The shapes are static. With single linkage the clusters are what is left of the shortest spanning
tree without its longest edges, and Prim's algorithm finds it in n - 1 steps over n distances. With
the others n - m steps merge one pair each, over n^2 distances. On a CPU the three stages of DeiT-S
take four to nine times as long as ToMe's matching of as many tokens (docs/measurements.md, CPU,
"agglomerative clusters").
"""

from tdm_jax.reduction.averages import AsCounted
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import Agglomeration
from tdm_jax.reduction.metrics import Keys
from tdm_jax.reduction.schedules import Schedule

ATC = Composed(
    title="ATC",
    schedule=Schedule(of_image=True),
    importance=None,
    decoupling=Decoupling(preset="diversity"),
    grouping=Agglomeration(),
    metric=Keys(),
    average=AsCounted(),
    proportional_attention=True,
)
