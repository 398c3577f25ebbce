"""What becomes of the tokens that are grouped: means of several kinds, or one of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.errors import unknown
from tdm_jax.ops.gathering import gather_tokens, one_hot
from tdm_jax.ops.merging import Merge
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.original_weights import import_stages
from tdm_jax.reduction.parts import Part, Scores, linear
from tdm_jax.reduction.token_state import TokenState


class Average(Part):
    """One token for each group: the mean by some weight."""

    # Whether it goes by the tokens' importance.
    by_score: ClassVar[bool] = False

    def macs(self, n: int, m: int, layer: int, shape: ViTShape) -> int | None:
        """Multiply-adds where n tokens become m; None for what a grouping counts for a mean."""
        return None

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        """Of each token in its group's mean.

        Args:
          state: the tokens.
          score: their importance; 1 where the method has none.
          weights: of the stage, where the average is learned.
          counted: whether tokens count in the attention by their size.
        """
        raise NotImplementedError

    def apply(
        self,
        state: TokenState,
        groups: Sequence[Merge],
        weight: Float[Array, "b n"],
        context: BlockContext,
    ) -> TokenState:
        """The tokens that are left: of each group what stays, with all that joins it."""
        return state.merge(groups, weight)


class ByAttention(Average):
    """By the tokens' importance (TDM)."""

    by_score = True

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        return score


class Uniform(Average):
    """Every token counts once, however many patches it stands for."""

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        return jnp.ones_like(state.size)


class BySize(Average):
    """The mean over patches (ToMe)."""

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        return state.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByBoth(Average):
    """By size times a power of the importance.

    Attributes:
      score_weight: the power.
    """

    by_score: ClassVar[bool] = True

    score_weight: float = 1.0

    def validate(self, title: str) -> None:
        self.demand(title, "score_weight", self.score_weight >= 0, "be at least 0")

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        # No root has a gradient at 0.
        return state.size * jnp.maximum(score, 1e-9) ** self.score_weight


class AsCounted(Average):
    """By size where tokens count so in the attention, else each once (ATC)."""

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        return state.size if counted else jnp.ones_like(state.size)


class Centre(Uniform):
    """No mean: the token that others join goes on as it is, and stands for them."""

    def macs(self, n: int, m: int, layer: int, shape: ViTShape) -> int | None:
        return 0

    def apply(
        self,
        state: TokenState,
        groups: Sequence[Merge],
        weight: Float[Array, "b n"],
        context: BlockContext,
    ) -> TokenState:
        return state.merge(groups, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Average):
    """By `exp(w x + b)` of the token x, learned (TCFormer, equation 4).

    Attributes:
      weight: what it is multiplied by: "uniform" for 1, or "size".
    """

    learned: ClassVar[bool] = True

    weight: str = "uniform"

    def validate(self, title: str) -> None:
        if self.weight not in ("uniform", "size"):
            raise unknown(f"{title} weight", self.weight, ("uniform", "size"))

    def macs(self, n: int, m: int, layer: int, shape: ViTShape) -> int | None:
        return 2 * n * shape.width  # the scores, and the means

    def init(self, key: Array, shape: ViTShape) -> Weights:
        return linear(key, shape.width, 1)

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        names = {"score.weight": "kernel", "score.bias": "bias"}
        return import_stages(owner, arrays, "cluster_layers", names)

    def weigh(self, state: TokenState, score: Scores, weights: Weights, counted: bool) -> Scores:
        logit = (state.tokens.astype(jnp.float32) @ weights["kernel"] + weights["bias"])[..., 0]
        # A factor that all tokens share leaves every mean as it is.
        logit = logit - jax.lax.stop_gradient(logit.max(axis=-1, keepdims=True))
        return jnp.exp(logit) * (state.size if self.weight == "size" else 1)


STRATEGIES = ("prune", "mean", "tofu", "mlerp")
MIXED = "prune-tofu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormKeeping(Uniform):
    """The plain mean at the length of the longest, or the partner alone (ToFu).

    Attributes:
      strategy: "tofu" for the mean times the largest norm over the norm that the partner had;
        "mlerp" for that over the mean's own norm; "mean"; "prune", which drops what joins; or
        "prune-tofu": the latter up to block L // 2 of L, then "tofu".
    """

    strategy: str = MIXED

    def validate(self, title: str) -> None:
        if self.strategy not in (MIXED, *STRATEGIES):
            raise unknown(f"{title} strategy", self.strategy, (MIXED, *STRATEGIES))

    def at(self, layer: int, depth: int) -> str:
        """What becomes of the matched tokens in a block, one of `STRATEGIES`."""
        if self.strategy != MIXED:
            return self.strategy
        return "tofu" if layer > depth // 2 else "prune"

    def macs(self, n: int, m: int, layer: int, shape: ViTShape) -> int | None:
        strategy = self.at(layer, shape.depth)
        if strategy not in ("tofu", "mlerp"):
            return 0
        # All norms, with "mlerp" the means' too, and the factor of each token that is left.
        return n + (m if strategy == "mlerp" else 0) + m * shape.width

    def apply(
        self,
        state: TokenState,
        groups: Sequence[Merge],
        weight: Float[Array, "b n"],
        context: BlockContext,
    ) -> TokenState:
        strategy = self.at(context.layer, context.shape.depth)
        if strategy == "prune":
            return state.select(jnp.concatenate([group.keep for group in groups], axis=1))
        merged = super().apply(state, groups, weight, context)
        if strategy == "mean":
            return merged
        own = norms(state.tokens)
        keep = jnp.concatenate([group.keep for group in groups], axis=1)
        reference = norms(merged.tokens) if strategy == "mlerp" else gather_tokens(own, keep)
        length = jnp.concatenate([largest(own, group) for group in groups], axis=1)
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


AVERAGES: dict[str, Average] = {
    "attention": ByAttention(),
    "uniform": Uniform(),
    "size": BySize(),
    "size_attention": ByBoth(),
    "counted": AsCounted(),
    "centre": Centre(),
    "scored": Scored(),
    "norm": NormKeeping(),
}
