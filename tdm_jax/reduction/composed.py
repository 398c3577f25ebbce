"""A method made of parts: a point in the space of methods.

A stage ranks its tokens by an *importance*, *decouples* the attentive from the others, *groups*
each side by a *metric*, and puts an *average* in the place of each group; afterwards tokens may
count in the *attention* as often as they stand for patches. A *schedule* says where, and how many
tokens are left. Every part is a small frozen value that can be used alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens, inverse_index, weighted_sum
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.averages import Average, ByAttention
from tdm_jax.reduction.contract import BlockContext, KeyMask, Reducer, ViTShape, Weights, plan
from tdm_jax.reduction.decoupling import PUBLISHED, Counts, Decoupling
from tdm_jax.reduction.groupings import DensityPeaks, Grouping, Members
from tdm_jax.reduction.importance import Chance, Importance, Preferred, check_importance
from tdm_jax.reduction.learned import key_mask
from tdm_jax.reduction.matching import match
from tdm_jax.reduction.metrics import Metric, Tokens
from tdm_jax.reduction.original_weights import stage_name
from tdm_jax.reduction.parts import Part
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenKind, TokenState, with_fused

_SCORE = "composed/score"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed(StageReducer):
    """A reducer made of parts. As it stands, TDM.

    Attributes:
      title: what error messages call the method.
      place: "before" a block, or "between" its attention and its MLP.
      importance: what ranks the tokens; None for a method that needs no order.
      decoupling: who is attentive, and how many tokens each side leaves.
      grouping: what groups the inattentive; None where they are dropped.
      metric: what the grouping compares.
      average: what becomes of a group.
      proportional_attention: whether a token counts in the attention as often as it has patches, as
        in ToMe (arXiv 2210.09461, equation 1); as a number the power of the size. No TDM paper has
        it, and networks that are used as they are keep much more by it.
    """

    title: str = "TDM"  # type: ignore[assignment]
    place: str = "between"
    importance: Importance | None = Preferred()
    decoupling: Decoupling = Decoupling()
    grouping: Grouping | None = DensityPeaks()
    metric: Metric = Tokens()
    average: Average = ByAttention()
    proportional_attention: bool | float = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place not in ("before", "between"):
            raise InputError(f"{self.title}: expected place before or between; got {self.place!r}")
        power = self.proportional_attention
        if not 0 <= power <= 1:
            raise InputError(
                f"{self.title}: expected proportional_attention as yes or no, or a power from 0 "
                f"to 1; got {power}"
            )
        for part in self.parts():
            part.validate(self.title)
        if self.schedule.by_stage:
            for rate in self.schedule.rates:
                if rate < 1:
                    self.decoupling.rates(self.title, rate)
        if self.decoupling.fixed and not (self.by_rate and self.schedule.round_to == 1):
            raise InputError(
                f"{self.title}: preset 'published' and an explicit cluster_rate fix the "
                "counts; expected them without counts, r and round_to"
            )
        if self.grouping is None and not self.decoupling.drops:
            raise InputError(
                f"{self.title}: expected a grouping, or preset='importance', which drops the "
                f"inattentive; got preset={self.decoupling.preset!r} and no grouping"
            )
        needs_order = self.average.by_score or bool(self.grouping and self.grouping.by_score)
        if self.importance is None and (needs_order or not self.decoupling.groups_all):
            raise InputError(f"{self.title}: expected an importance to go by; got none")
        if self.before and self.grouping is not None and self.metric.reads_attention:
            raise InputError(
                f"{self.title}: before a block there is no attention to take a metric from; "
                "expected place='between', or a metric of the tokens"
            )
        if len(learned := [part for part in self.parts() if part.learned]) > 1:
            names = " and ".join(type(part).__name__ for part in learned)
            raise InputError(f"{self.title}: expected one learned part; got {names}")

    def parts(self) -> tuple[Part, ...]:
        """All parts but the schedule."""
        used = (self.importance, self.decoupling, self.grouping, self.metric, self.average)
        return tuple(part for part in used if part is not None)

    def variants(self, shape: ViTShape) -> Sequence[Reducer]:
        if self.decoupling.preset == "published":
            return [self.at_keep_rate(rate) for rate in sorted(PUBLISHED, reverse=True)]
        return super().variants(shape)

    @property
    def draws(self) -> bool:
        return isinstance(self.importance, Chance)

    @property
    def before(self) -> bool:
        return self.place == "before"

    @property
    def _learned_part(self) -> Part | None:
        return next((part for part in self.parts() if part.learned), None)

    @property
    def learned(self) -> bool:  # type: ignore[override]
        """Whether a part of it has weights."""
        return self._learned_part is not None

    def warmed_up(self, share: float) -> Reducer:
        if share == 1:
            return self
        # Settings for a few keep rates only cannot serve on the way.
        way = dataclasses.replace(self, decoupling=self.decoupling.derived())
        return super(Composed, way).warmed_up(share)

    def stages(self, shape: ViTShape) -> tuple[int, ...]:
        stages = super().stages(shape)
        # Before block 0 no attention has been measured.
        skips = self.schedule.layers == "all" and self._previous_attention(shape)
        return stages[1:] if skips else stages

    def _of(self, shape: ViTShape) -> Importance | None:
        return None if self.importance is None else self.importance.for_model(shape)

    def _recorded(self, shape: ViTShape) -> bool:
        """Whether the block before a stage measures the importance."""
        part = self._of(shape)
        updated = part is not None and part.reads == "update"
        return updated or self._previous_attention(shape)

    def _previous_attention(self, shape: ViTShape) -> bool:
        """Whether a stage goes by the attention of the block before it."""
        part = self._of(shape)
        return self.before and part is not None and part.reads == "attention"

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        stages, part = self.stages(shape), self._of(shape)
        if part is not None:
            check_importance(self.title, part, shape)
        for other in self.parts():
            other.check(self.title, stages, shape)
        if 0 in stages and self._recorded(shape):
            raise InputError(
                f"{self.title}: importance is measured in the block before a stage; expected "
                f"layers from 1; got {', '.join(map(str, stages))}"
            )
        if self.schedule.r is not None and self.decoupling.groups_all and self.grouping is not None:
            most = max(self.schedule.removed(shape))
            removable = shape.patches - self.grouping.fewest(shape.patches)
            if most > removable and removable < shape.patches - 1:
                raise InputError(
                    f"{self.title}: r must be at most half of the {shape.patches} patches; "
                    f"got {most}"
                )

    def counts(self, stage: int, n: int, shape: ViTShape) -> Counts | None:
        """What a stage makes of n tokens; None if it leaves them all.

        Raises:
          InputError: there is no way to leave so many.
        """
        kept = self.schedule.count(stage, n, shape)
        rate = self._rate(stage, kept, n)
        if rate == 1:
            return None
        # A rate alone leaves the fused token out of what it counts (TDM.md); an explicit count is
        # the whole.
        exact = not self.schedule.by_stage or self.schedule.round_to > 1
        counts = self.decoupling.counts(self.title, n, rate, kept, exact)
        if self.grouping is not None and counts.clusters:
            grouped = n - counts.attentive
            fewest = self.grouping.fewest(grouped)
            if counts.clusters < fewest and not self.schedule.shrinks:
                raise InputError(
                    f"{self.title}: a stage merges at most half of its {grouped} tokens; expected "
                    f"a count of at least {counts.total - counts.clusters + fewest}; "
                    f"got {counts.total}"
                )
            counts = counts._replace(clusters=max(counts.clusters, fewest))
        return counts if counts.total < n else None

    def _rate(self, stage: int, kept: int, n: int) -> float:
        """The keep rate of a stage that is to leave `kept` of n tokens."""
        return self.schedule.rate(stage) if self.schedule.by_stage else kept / n

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        counts = self.counts(stage, n, shape)
        return n if counts is None else counts.total

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        if self.block_plan(layer, n, shape) == (n, n, n):
            return 0
        stage = self.stages(shape).index(layer)
        counts: Any = self.counts(stage, n, shape)
        part, d, k = self._of(shape), shape.width, counts.attentive
        total = counts.fused * d * (n - k)
        if part is not None:
            total += part.macs(n, shape)
        if counts.clusters:
            total += self.metric.macs(n + shape.prefix, shape)
            total += self._grouping_macs(n - k, counts.clusters, layer, shape)
        # The authors' program clusters even a group too small to lose a token.
        rate = self._rate(stage, self.schedule.count(stage, n, shape), n)
        match_rate = self.decoupling.rates(self.title, rate).match
        if self.decoupling.merge == "cluster" and k and match_rate < 1:
            total += self._grouping_macs(k, counts.matched, layer, shape)
        elif self.decoupling.merge == "match" and counts.matched < k:
            # Norms and weights of the tokens, and the similarities of sources and destinations.
            total += 2 * d * k + (k // 2) * (k - k // 2) * d
        return total

    def _grouping_macs(self, n: int, m: int, layer: int, shape: ViTShape) -> int:
        grouping: Any = self.grouping
        means = self.average.macs(n, m, layer, shape)
        means = grouping.mean_macs(n, shape) if means is None else means
        return grouping.macs(n, self.metric.width(shape), shape) + means

    def init(self, key: Array, shape: ViTShape) -> Weights:
        part = self._learned_part
        if part is None:
            return {}
        keys = jax.random.split(key, len(self.stages(shape)))
        return {stage_name(stage): part.init(key, shape) for stage, key in enumerate(keys)}

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        part = self._learned_part
        return super().import_weights(arrays) if part is None else part.import_weights(self, arrays)

    def _weights(self, stage: int, context: BlockContext) -> Weights:
        return context.weights[stage_name(stage)] if self.learned else {}

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | KeyMask | None:
        if state.valid is not None:
            return key_mask(state)
        power = float(self.proportional_attention)
        return state.proportional(power) if power else None

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if not (context.train and self._masks):
            return super().before_block(state, context)
        blocks, layer = plan(self, context.shape), context.layer
        arriving = blocks[layer - 1].out if layer else context.shape.patches
        if blocks[layer].out == arriving:
            return state
        part: Any = self.importance
        weights = self._weights(self.stage(context), context)
        return part.mask(state, context, weights, blocks[layer].out / context.shape.patches)

    @property
    def _masks(self) -> bool:
        """Whether training hides what inference drops."""
        return self.importance is not None and self.importance.masks and self.decoupling.drops

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        if self._previous_attention(context.shape):
            return self._record(state, context)
        return super().after_attention(state, context)

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        part = self._of(context.shape)
        if part is not None and part.reads == "update":
            return self._record(state, context)
        return state

    def _record(self, state: TokenState, context: BlockContext) -> TokenState:
        """The tokens with the importance that the stage in the next block goes by."""
        following = context.replace(layer=context.layer + 1)
        if not self.reduces(state, following):
            return state
        part: Any = self._of(context.shape)
        score = part.measure(state, context, self._weights(self.stage(following), context))
        return state.replace(carry={**state.carry, _SCORE: score})

    def score(
        self, state: TokenState, context: BlockContext
    ) -> tuple[TokenState, Float[Array, "b n"]]:
        """A stage's tokens without, and their importance: 1 where nothing ranks them."""
        part = self._of(context.shape)
        if part is None:
            return state, jnp.ones_like(state.size)
        if _SCORE in state.carry:
            carry = dict(state.carry)
            score = carry.pop(_SCORE)
            return state.replace(carry=carry), score
        return state, part.measure(state, context, self._weights(self.stage(context), context))

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        counts: Any = self.counts(self.stage(context), state.count, context.shape)
        state, score = self.score(state, context)
        return self.apply(state, score, counts, context)

    def apply(
        self,
        state: TokenState,
        score: Float[Array, "b n"],
        counts: Counts,
        context: BlockContext,
    ) -> TokenState:
        """One stage: `counts.total` tokens, first the attentive, then the groups.

        Where the grouping goes by place, all stay in the order in which they stood.

        Args:
          state: the tokens.
          score: importance.
          counts: of this stage.
          context: of this stage.
        """
        n, k = state.count, counts.attentive
        weights = self._weights(self.stage(context), context)
        weight = self.average.weigh(state, score, weights, bool(self.proportional_attention))

        def members(index: Int[Array, "b m"] | None, prefix: int = 0) -> Members:
            vectors = self.metric.of(state, context, weights, index)
            if index is None:
                return Members(vectors, score, state.size, context, prefix)
            size = gather_tokens(state.size, index)
            return Members(vectors, gather_tokens(score, index), size, context)

        if not k:
            grouped = self._grouped(members(None, context.shape.prefix), counts.clusters)
            return self._marked(self.average.apply(state, [grouped], weight, context), 0)
        part: Any = self.importance
        priority = part.priority(score, k)
        if not counts.clusters and counts.matched == k:
            return self._kept(state, score, argtopk(priority, k), counts.fused, context)
        order = argtopk(priority, n)
        # Even ranks before odd ones: destinations and sources of the matching.
        order = jnp.concatenate([order[:, 0:k:2], order[:, 1:k:2], order[:, k:]], axis=1)
        attentive, rest = order[:, :k], order[:, k:]
        if self.grouping is not None and self.grouping.by_place:
            rest = jnp.sort(rest, axis=1)
        groups = [self._matched(members(attentive), counts.matched).of(attentive)]
        if counts.clusters:
            groups.append(self._grouped(members(rest), counts.clusters).of(rest))
        if self.grouping is not None and self.grouping.by_place:
            groups = [functools.reduce(Merge.beside, groups).in_order()]
        merged = self._marked(self.average.apply(state, groups, weight, context), counts.matched)
        if not counts.fused:
            return merged
        left_over = jnp.where(inverse_index(attentive, n) < 0, score, 0.0)
        return merged.append(weighted_sum(left_over[..., None], state.tokens), TokenKind.FUSED)

    def _grouped(self, members: Members, count: int) -> Merge:
        grouping: Any = self.grouping
        return grouping.merge(members, count)

    def _matched(self, members: Members, count: int) -> Merge:
        if count == members.metric.shape[1]:
            return Merge.all(members.metric)
        if self.decoupling.merge == "match":
            return match(members.metric, count)
        return self._grouped(members, count)

    def _marked(self, state: TokenState, kept: int) -> TokenState:
        """The state whose tokens behind the first `kept` are clusters, if a grouping makes such."""
        if self.grouping is None or not self.grouping.makes_clusters:
            return state
        kind = jnp.where(jnp.arange(state.count) < kept, state.kind, TokenKind.CLUSTER)
        return state.replace(kind=kind)

    def _kept(
        self,
        state: TokenState,
        score: Float[Array, "b n"],
        index: Int[Array, "b k"],
        fused: int,
        context: BlockContext,
    ) -> TokenState:
        """The tokens at `index` alone, or with one that is made of the others."""
        if not fused:
            kept = state.select(index)
            if not (context.train and self.importance and self.importance.straight_through):
                return kept
            soft = gather_tokens(score, index)
            one = 1 + (soft - jax.lax.stop_gradient(soft))
            return kept.replace(tokens=kept.tokens * one[..., None].astype(kept.tokens.dtype))
        place = inverse_index(index, state.count)
        left_over = jnp.where(place < 0, score, 0.0)
        last = weighted_sum(left_over[..., None], state.tokens)
        return state.replace_tokens(
            jnp.concatenate([gather_tokens(state.tokens, index), last], axis=1),
            jnp.where(place < 0, index.shape[1], place),
            with_fused(gather_tokens(state.kind, index)),
        )

    def losses(self, info: Any, logits: Any, labels: Any, teacher: Any = None) -> dict[str, Array]:
        part = self.importance
        return {} if part is None else part.losses(self.title, info, logits, labels, teacher)
