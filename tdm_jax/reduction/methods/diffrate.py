"""DiffRate: Differentiable Compression Rate (Chen et al., ICCV 2023, arXiv 2305.17997).

In every block, between attention and MLP, by two counts for each block:

1. The patches are sorted by the class token's attention, averaged over heads.
2. Pruning keeps the first of them, merging the first of those.
3. What is pruned is dropped. What is merged away joins the patch, of those that stay, with the
   highest cosine of the tokens themselves: a plain mean of the patch and all that join it.

A token counts in the attention by a weight of its own, 1 at first, to which whatever joins it adds
its weight times that cosine: the more alike, the more. It is carried beside the number of patches,
which stays what it is (`carry`), and bounded below, as cosines may be negative.

The counts are what the authors search, by gradients, for a budget; those they published are in
`diffrate_counts`. The search is not here. A block that removes nothing is not sorted either: the
order of tokens means nothing to it, nor to the next block, which sorts again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError, unknown
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, one_hot
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Reducer, ViTShape, require
from tdm_jax.reduction.diffrate_counts import PUBLISHED, KeptCounts, published_counts
from tdm_jax.reduction.token_state import TokenState

_WEIGHT = "diffrate/weight"
# Of a token in the attention, which takes its logarithm.
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffRate(Reducer):
    """Drops the patches of least class attention, and merges the next ones into the others.

    Attributes:
      prune_kept: tokens that pruning leaves in each block, the class token counted; a count above
        what reaches the block drops nothing. None with `merge_kept` drops nothing at all.
      merge_kept: tokens that are left in each block once others have merged into them, likewise.
      published: where neither is given, which published counts are carried to the model's patches:
        one of `PUBLISHED`, by DeiT's size and the budget in GMACs.
    """

    needs_class_token: ClassVar[bool] = True

    prune_kept: tuple[int, ...] | None = None
    merge_kept: tuple[int, ...] | None = None
    published: str = "small_2.9"

    def __post_init__(self) -> None:
        for setting in ("prune_kept", "merge_kept"):
            least = min(getattr(self, setting) or (2,))
            require(self, setting, least >= 2, "count the class token and at least one patch")
        if self.published not in PUBLISHED:
            raise unknown("DiffRate published", self.published, PUBLISHED)

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        kept = self.kept(shape)
        if self._by_name and shape.depth != len(kept.prune):
            raise InputError(
                f"DiffRate: published counts are of {len(kept.prune)} blocks and the model has "
                f"{shape.depth}; expected prune_kept or merge_kept, one number for each block"
            )
        for setting, counts in zip(("prune_kept", "merge_kept"), kept, strict=True):
            if len(counts) != shape.depth:
                raise InputError(
                    f"DiffRate: {setting} must have one number for each of the {shape.depth} "
                    f"blocks; got {len(counts)}"
                )

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        raise InputError(
            f"DiffRate has no keep rate: expected prune_kept and merge_kept, or published with one "
            f"of {', '.join(PUBLISHED)}; got {keep_rate}"
        )

    def variants(self, shape: ViTShape) -> Sequence[Reducer]:
        every = [
            dataclasses.replace(self, prune_kept=None, merge_kept=None, published=name)
            for name in PUBLISHED
            if len(PUBLISHED[name].merge) == shape.depth
        ]
        return sorted(every, key=lambda own: -sum(own.kept(shape).merge))

    @property
    def _by_name(self) -> bool:
        return self.prune_kept is None and self.merge_kept is None

    def kept(self, shape: ViTShape) -> KeptCounts:
        """Tokens that stay in each block, the class token counted."""
        if self._by_name:
            return published_counts(self.published, shape.patches)
        all_tokens = (shape.patches + 1,) * shape.depth
        return KeptCounts(self.prune_kept or all_tokens, self.merge_kept or all_tokens)

    def counts(self, layer: int, n: int, shape: ViTShape) -> tuple[int, int]:
        """Patches that pruning, then merging, leaves of the `n` that reach a block."""
        prune, merge = (min(counts[layer] - 1, n) for counts in self.kept(shape))
        return prune, min(merge, prune)

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        _, m = self.counts(layer, n, shape)
        return BlockPlan(n, m, m)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        prune, merge = self.counts(layer, n, shape)
        if merge == n:
            return 0
        # The mean over heads; cosines, weights times cosines, and the means.
        merging = (prune - merge) * (merge * shape.width + 1) + merge * shape.width
        return n + (merging if merge < prune else 0)

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        if _WEIGHT not in state.carry:
            return None
        before = ((0, 0), (state.prefix.shape[1], 0))
        return jnp.pad(state.carry[_WEIGHT], before, constant_values=1.0)

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        prune, merge = self.counts(context.layer, state.count, context.shape)
        if merge == state.count:
            return state
        attention: Any = context.attention  # there is one after it
        order = argtopk(attention.class_row().mean(axis=1), prune)
        if merge == prune:
            return _pruned(state, order)
        return _merged(state, order[:, :merge], order[:, merge:])


def _pruned(state: TokenState, index: Int[Array, "b k"]) -> TokenState:
    """The tokens at `index`, with their weights in the attention."""
    carry = dict(state.carry)
    if _WEIGHT in carry:
        carry[_WEIGHT] = gather_tokens(carry[_WEIGHT], index)
    return state.select(index).replace(carry=carry)


def _merged(state: TokenState, keep: Int[Array, "b m"], gone: Int[Array, "b r"]) -> TokenState:
    """The tokens at `keep`, joined by those at `gone`; the others are dropped."""
    partner, cosine = most_alike(state.gather(gone), state.gather(keep))
    weight = state.carry.get(_WEIGHT, jnp.ones_like(state.size))
    joined = alike_weight(gather_tokens(weight, keep), gather_tokens(weight, gone), partner, cosine)
    merged = state.merge([Merge(keep, gone, partner)], jnp.ones_like(state.size))
    return merged.replace(carry={**state.carry, _WEIGHT: joined})


def most_alike(
    x: Float[Array, "b r d"], y: Float[Array, "b m d"]
) -> tuple[Int[Array, "b r"], Float[Array, "b r"]]:
    """Which of `y` has the highest cosine with each of `x`, and that cosine."""
    similarity = cosine_similarity(x, y)
    return jnp.argmax(similarity, axis=-1), similarity.max(axis=-1)


def alike_weight(
    weight: Float[Array, "b m"],
    joining: Float[Array, "b r"],
    partner: Int[Array, "b r"],
    cosine: Float[Array, "b r"],
) -> Float[Array, "b m"]:
    """Weights to which each token that joins adds its own, times how alike it is."""
    share = one_hot(partner, weight.shape[1]) * (joining * cosine)[..., None]
    return jnp.maximum(weight + share.sum(axis=1), _LEAST)
