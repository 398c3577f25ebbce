"""ATS: Adaptive Token Sampling (Fayyaz et al., ECCV 2022, arXiv 2111.15667).

In the attention of blocks 3, 6 and 9 (from 0) a patch scores `sum_h A_h[cls, j] * ||v_hj||`, head
by head, normalised over the patches. The cumulative score is a distribution over the patches in
their order, and is sampled by inverse transform at fixed points: with
`S = floor(keep_rate^(i+1) * p) + 1` at stage i, each of the S - 1 points `(2t + 1) / (2S)` picks
the patch whose cumulative score is nearest. Points that pick the same patch count once, so an image
with few important patches keeps fewer tokens. Survivors stay in index order; the others are keys
and values of this attention one last time.

The count differs from image to image, shapes must not: a stage has S - 1 slots, or `counts` of them
(see `tdm_jax.calibrate`), and those that an image does not fill are masked out of the attention.
With fewer slots than survivors the survivors of lowest score go; otherwise the result is that of
the image on its own.

"ats+tdm": sampled by as many points as there are attentive tokens, filled up with the tokens of
highest score; the others are clustered. No slot is empty.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tdm_jax.ops.gathering import gather_tokens, inverse_index
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, Probe, Reducer, ViTShape
from tdm_jax.reduction.importance import HeadValueNorm
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ATS(StageReducer):
    """Samples patches by their cumulative score. Its `counts` are slots, None for one a point."""

    needs_class_token: ClassVar[bool] = True

    schedule: Schedule = Schedule(of_image=True)

    @property
    def adaptive(self) -> bool:
        return True

    def calibrated(self, probe: Probe, quantile: float) -> Reducer:
        free = self.scheduled(dataclasses.replace(self.schedule, counts=None))
        slots = probe.token_counts(free, quantile)
        return self.scheduled(dataclasses.replace(self.schedule, counts=slots))

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        reduced = self.block_plan(layer, n, shape) != (n, n, n)
        return HeadValueNorm().macs(n, shape) if reduced else 0

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        if state.valid is None:
            return None
        return jnp.pad(state.valid, ((0, 0), (state.prefix.shape[1], 0)), constant_values=1.0)

    def acts(self, layer: int, n: int, shape: ViTShape) -> bool:
        return super().acts(layer, n, shape) or self._samples(layer, shape)

    def _samples(self, layer: int, shape: ViTShape) -> bool:
        # As many slots as tokens are no reason not to sample: that leaves some of them empty.
        if layer not in self.stages(shape):
            return False
        points = self.schedule.of_all(self.stages(shape).index(layer), shape.patches)
        return points < shape.patches

    def reduces(self, state: TokenState, context: BlockContext) -> bool:
        return super().reduces(state, context) or self._samples(context.layer, context.shape)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        stage = self.stage(context)
        score = HeadValueNorm().measure(state, context, {})
        slots = self.stage_count(stage, state.count, context.shape)
        picked = sample(score, state.valid, self.schedule.of_all(stage, context.shape.patches))
        rank = inverse_index(argtopk(jnp.where(picked, score, -1.0), slots), state.count)
        survives = picked & (rank >= 0)
        # Stable: survivors in index order, then tokens to fill the empty slots with.
        index = argtopk(survives.astype(jnp.float32), slots)
        return state.replace_tokens(
            gather_tokens(state.tokens, index),
            jnp.where(survives, inverse_index(index, state.count), -1),
            gather_tokens(state.kind, index),
            valid=gather_tokens(survives, index).astype(jnp.float32),
        )


class Sampled(HeadValueNorm):
    """ATS's score; the most important tokens are those that its sampling picks."""

    def priority(self, score: Float[Array, "b n"], count: int) -> Float[Array, "b n"]:
        # Scores are below 1: what was sampled comes first.
        return sample(score, None, count) + score


ATS_TDM = Composed(title="ATS with TDM", schedule=Schedule(of_image=True), importance=Sampled())


def sample(
    score: Float[Array, "b n"], valid: Float[Array, "b n"] | None, points: int
) -> Bool[Array, "b n"]:
    """Inverse transform sampling at fixed points.

    Args:
      score: sums to 1.
      valid: 0 where there is no token; None where all are real.
      points: their number, S - 1.

    Returns:
      Whether some point lies nearest to a token's cumulative score, ties to the lower index.
    """
    score = jax.lax.stop_gradient(score)
    cumulative = jnp.cumsum(score, axis=-1)
    if valid is not None:
        cumulative = jnp.where(valid > 0, cumulative, jnp.inf)
    at = (2 * jnp.arange(points) + 1) / (2 * (points + 1))
    nearest = jnp.argmin(jnp.abs(cumulative[:, None, :] - at[:, None]), axis=-1)
    return (nearest[:, :, None] == jnp.arange(score.shape[1])).any(axis=1)
