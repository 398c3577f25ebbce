"""Top-K: keep the tokens that the class token attends to most, drop the others.

The importance-only baseline of "Beyond Attentive Tokens" (Long et al., CVPR 2023, arXiv
2211.11315) and of the token reduction benchmarks. In blocks 3, 6 and 9 (from 0), between attention
and MLP, `ceil(keep_rate * n)` of n tokens stay, ordered by score.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.scores import SCORES, importance
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
        if self.importance not in SCORES:
            raise unknown(f"{self.title} importance", self.importance, SCORES)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        if self.importance == "class" and not shape.class_token:
            raise InputError(
                f"{self.title}: importance 'class' needs a class token and the model has none; "
                "expected importance='mean' or 'key_norm'"
            )

    def score_macs(self, n: int, shape: ViTShape) -> int:
        # The mean over heads; over heads and queries; or the squares of the keys.
        return {"class": n, "mean": n, "key_norm": n * shape.width}[self.importance]

    def score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        attention: Any = context.attention  # there is one after it
        return importance(self.importance, attention)
