"""Top-K: keep the tokens that the class token attends to most, drop the others.

The importance-only baseline of "Beyond Attentive Tokens" (Long et al., CVPR 2023, arXiv
2211.11315) and of the token reduction benchmarks. In blocks 3, 6 and 9 (from 0), between attention
and MLP, `ceil(keep_rate * n)` of n tokens stay, ordered by score.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from tdm_jax.errors import unknown
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.scores import (
    SCORES,
    check_importance,
    default_importance,
    forget_shift,
    record_shift,
)
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(PruneReducer):
    """Keeps the tokens with the highest importance.

    Attributes:
      importance: what ranks the tokens, one of `SCORES`, see `tdm_jax.reduction.scores`: "class",
        "mean" (attention received), "key_norm", "pool" or "shift". None for "class", or, for a
        model without class token, "mean".
    """

    importance: str | None = None

    @property
    def title(self) -> str:
        tdm = self.merger is not None and type(self) is TopK
        return "TDM" if tdm else super().title

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in (None, *SCORES):
            raise unknown(f"{self.title} importance", self.importance, SCORES)

    def score_name(self, shape: ViTShape) -> str:
        """What ranks the tokens of a model."""
        return self.importance or default_importance(shape)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        check_importance(self.title, self.score_name(shape), self.stages(shape), shape)

    def score_macs(self, n: int, shape: ViTShape) -> int:
        return SCORES[self.score_name(shape)].macs(n, shape)

    def score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        return SCORES[self.score_name(context.shape)].measure(state, context)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        return forget_shift(super().reduce(state, context))

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        following = context.replace(layer=context.layer + 1)
        if self.score_name(context.shape) == "shift" and self.reduces(state, following):
            update: Any = context.update  # there is one after the block
            return record_shift(state, update)
        return state
