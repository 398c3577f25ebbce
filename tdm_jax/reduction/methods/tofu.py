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

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError, unknown
from tdm_jax.ops.gathering import gather_tokens, one_hot
from tdm_jax.ops.merging import Merge
from tdm_jax.reduction.contract import BlockContext, ViTShape, require
from tdm_jax.reduction.methods.tome import ToMe
from tdm_jax.reduction.schedules import inflected
from tdm_jax.reduction.token_state import TokenState

STRATEGIES = ("prune", "mean", "tofu", "mlerp")
MIXED = "prune-tofu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToFu(ToMe):
    """Drops the matched tokens in the first half of the blocks, fuses them in the second.

    Attributes:
      r: as every method has it; `inflected` makes a list of it from a total.
      inflection: slope of an `r` for all stages, from -1 (2r to 0) to 1 (0 to 2r), see `inflected`.
      strategy: "prune-tofu" as above; or for all blocks "prune", "mean", "tofu" or "mlerp".
      proportional_attention: as ToMe's; off, as the authors have it.
    """

    inflection: float = 0.0
    strategy: str = MIXED
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in (MIXED, *STRATEGIES):
            raise unknown("ToFu strategy", self.strategy, (MIXED, *STRATEGIES))
        require(self, "inflection", -1 <= self.inflection <= 1, "be from -1 to 1")
        if self.inflection and self.ramp != "constant":
            raise InputError(
                f"ToFu: expected a ramp or an inflection; got ramp={self.ramp!r}, "
                f"inflection={self.inflection:g}"
            )

    def removed(self, shape: ViTShape) -> tuple[int, ...]:
        if self.inflection and isinstance(self.r, int):
            return inflected(self.r, self.inflection, len(self.stages(shape)))
        return super().removed(shape)

    def strategy_at(self, layer: int, depth: int) -> str:
        """What becomes of the matched tokens in a block, one of `STRATEGIES`."""
        if self.strategy != MIXED:
            return self.strategy
        return "tofu" if layer > depth // 2 else "prune"

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if not self.acts(layer, n, shape):
            return 0
        own = self.match_macs(n, shape)
        strategy = self.strategy_at(layer, shape.depth)
        if strategy not in ("tofu", "mlerp"):
            return own
        # All norms, with "mlerp" the means' too, and the factor of each token that is left.
        m = self.block_plan(layer, n, shape).out
        return own + n + (m if strategy == "mlerp" else 0) + m * shape.width

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        merge = self.match(state, context)
        strategy = self.strategy_at(context.layer, context.shape.depth)
        if strategy == "prune":
            return state.select(merge.keep)
        merged = state.merge([merge], jnp.ones_like(state.size))
        if strategy == "mean":
            return merged
        own = norms(state.tokens)
        reference = norms(merged.tokens) if strategy == "mlerp" else gather_tokens(own, merge.keep)
        length = largest(own, merge)
        scale = (length / reference)[..., None].astype(merged.tokens.dtype)
        return merged.replace(tokens=merged.tokens * scale)


def norms(tokens: Float[Array, "b n d"]) -> Float[Array, "b n"]:
    """Euclidean norms in float32, above 0: no norm has a gradient there."""
    x = tokens.astype(jnp.float32)
    return jnp.sqrt(jnp.maximum((x * x).sum(axis=-1), 1e-18))


def largest(value: Float[Array, "b n"], merge: Merge) -> Float[Array, "b m"]:
    """The largest value among each token that is left and those that join it.

    Args:
      value: positive, of each token.
      merge: which join which.
    """
    kept, gone = (gather_tokens(value, index) for index in (merge.keep, merge.gone))
    joined = one_hot(merge.into, merge.keep.shape[1]) * gone[..., None]
    return jnp.maximum(kept, joined.max(axis=1))
