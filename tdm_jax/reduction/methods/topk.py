"""Top-K: keep the tokens that the class token attends to most, drop the others.

The importance-only baseline of "Beyond Attentive Tokens" (Long et al., CVPR 2023, arXiv
2211.11315) and of the token reduction benchmarks. In blocks 3, 6 and 9 (from 0), between attention
and MLP, `ceil(keep_rate * n)` of n tokens stay, ordered by score.
"""

import dataclasses

from jaxtyping import Array, Float

from tdm_jax.reduction.contract import Attention, BlockContext, ViTShape
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.scores import check_score, importance
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(PruneReducer):
    """Keeps the tokens with the highest importance.

    Attributes:
      importance: "class" (attention of the class token, averaged over heads), or, for models
        without one, "mean" (attention received) or "key_norm".
    """

    importance: str = "class"

    @property
    def title(self) -> str:
        tdm = self.merger is not None and type(self) is TopK
        return "TDM" if tdm else super().title

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.title, self.importance)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        check_score(self.title, self.importance, shape)

    def score_macs(self, n: int, shape: ViTShape) -> int:
        # The mean over heads; over heads and queries; or the squares of the keys.
        return {"class": n, "mean": n, "key_norm": n * shape.width}[self.importance]

    def score(
        self, state: TokenState, context: BlockContext, attention: Attention | None
    ) -> Float[Array, "b n"]:
        return importance(self.importance, attention)
