"""ToFu: Token Fusion, Bridging the Gap between Token Pruning and Token Merging.

Kim et al., WACV 2024 (arXiv 2312.01026), as the OpenToMe benchmark has it. In every block i of L,
between attention and MLP, tokens are matched as in ToMe, and then:

- up to block L // 2 the r matched tokens are dropped, their partners stay as they are: early layers
  answer too unsteadily to what lies between two tokens to average them;
- in later blocks token and partner become one. Its direction is that of their plain mean, and its
  length is kept from shrinking: the mean times the largest norm among them, over the norm that the
  partner had (`"tofu"`). Over the mean's own norm it would keep the largest norm exactly, which is
  the idea of MLERP (`"mlerp"`).

No proportional attention. Tokens count once in a mean, however many patches they stand for.
"""

from tdm_jax.reduction.averages import NormKeeping
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.groupings import Bipartite
from tdm_jax.reduction.metrics import Keys
from tdm_jax.reduction.schedules import Schedule

TOFU = Composed(
    title="ToFu",
    schedule=Schedule(layers="all", at_cost_of="r"),
    importance=None,
    decoupling=Decoupling(preset="diversity"),
    grouping=Bipartite(),
    metric=Keys(),
    average=NormKeeping(),
)
