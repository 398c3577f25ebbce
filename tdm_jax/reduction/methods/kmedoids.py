"""K-Medoids: Token Pooling in Vision Transformers (Marin et al., WACV 2023, arXiv 2110.03860).

Before blocks 3, 6 and 9 (from 0) the tokens become `floor(p * keep_rate^i)` medoids, by weighted
K-Medoids (algorithm 2). The weight `w_j` of a token is the attention it received in the block
before, summed over heads and queries. The centres start as the tokens of the highest weight; then,
`iterations` times, each token joins its nearest centre, and in each cluster the token i with the
least `w_i sum_j D_ij`, with j over all tokens, becomes the centre. What goes on are the centres
themselves; every token is stood for by the nearest of them.

The sum over all tokens is the token reduction benchmarks' (arXiv 2308.04657), whose answers the
tests hold; one over the cluster's own members would be the textbook's.
"""

from tdm_jax.reduction.averages import Centre
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import Medoids
from tdm_jax.reduction.importance import Received
from tdm_jax.reduction.schedules import Schedule

KMEDOIDS = Composed(
    title="KMedoids",
    schedule=Schedule(of_image=True),
    place="before",
    importance=Received(),
    decoupling=Decoupling(preset="diversity"),
    grouping=Medoids(),
    average=Centre(),
)
