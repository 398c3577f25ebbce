"""ToCom: Token Compensator (Jie et al., ECCV 2024, arXiv 2408.06798).

A model that was trained with `source_r` tokens merged in every block loses when another number of
them is merged. ToCom merges as ToMe does, r in every block with proportional attention, and
corrects the queries and values of each block by a low-rank map of the normed tokens z,

    q += scale * U_q (m * D_q z),   v += scale * U_v (m * D_v z)

of D: width to `dim`, U: back, without bias; keys, and so the choice of what merges, stay. For each
token more, or fewer, in a block `dim / 16` channels are switched on: m is 1 on the last `g r`
channels, less 1 on the last `g source_r`, `g = dim / 16`. At `r = source_r` it is plain ToMe.

m is constant, so the map is part of the kernel that makes queries and values. That is more than a
hook on tokens can do: the method hands the block what to add to its kernel (`qkv_update`), once a
batch, and `tdm_jax.models.folding.fold` adds it for good, after which it costs nothing.

D and U are learned once for all pairs, by distillation (configs/tocom.py): at each step r and
source_r are drawn, from 0 to 16, and what r leaves with the correction learns to answer as the same
model does by plain ToMe with source_r. One program serves all pairs (`tdm_jax.reduction.elastic`),
and only the maps are trained. As they are part of a kernel, the authors' dropout of 0.1 between
them has no place.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import (
    AttentionMap,
    BlockContext,
    BlockPlan,
    KeyMask,
    Reducer,
    ViTShape,
    Weights,
    require,
)
from tdm_jax.reduction.elastic import drawn_pair, leading, merge_leading, visible
from tdm_jax.reduction.learned import training_key
from tdm_jax.reduction.methods.tome import TOME
from tdm_jax.reduction.original_weights import import_stages, stage_name
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState

# The most tokens that a block may merge: as many groups of channels there are.
MOST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Reducer):
    """ToMe in every block, with a number that is drawn anew for each forward pass.

    Attributes:
      which: of the drawn pair: 0 for the student's number, 1 for the teacher's.
    """

    which: int

    def pair(self, context: BlockContext) -> Int[Array, "2"]:
        """R and source_r of this forward pass."""
        most = min(MOST, context.shape.patches // 2)
        return drawn_pair(training_key("ToCom", context.pass_key), most)

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"]:
        return visible(state)

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        r = self.pair(context)[self.which]
        metric: Any = TOME.metric.of_all(state, context, {})
        return merge_leading(
            state, metric, *leading(context.shape.patches, r, merges=context.layer)
        )


STUDENT, TEACHER = Drawn(which=0), Drawn(which=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToCom(Reducer):
    """ToMe, corrected for a model that was trained with another r.

    Attributes:
      r: tokens that merge in every block, at most 16.
      source_r: with which the model was trained; 0 for a plain one.
      scale: of the correction; the authors take 0.05 to 0.15.
      dim: channels between the two maps, a multiple of 16.
    """

    learned: ClassVar[bool] = True

    r: int = 8
    source_r: int = 0
    scale: float = 0.1
    dim: int = 32

    def __post_init__(self) -> None:
        require(self, "r", 0 <= self.r <= MOST, f"be from 0 to {MOST}")
        require(self, "source_r", 0 <= self.source_r <= MOST, f"be from 0 to {MOST}")
        valid = self.dim > 0 and self.dim % MOST == 0
        require(self, "dim", valid, f"be a positive multiple of {MOST}")

    @property
    def merger(self) -> StageReducer:
        """What merges the tokens."""
        return TOME.scheduled(dataclasses.replace(TOME.schedule, r=self.r))

    def check(self, shape: ViTShape) -> None:
        most = shape.patches // 2
        require(self, "r", self.r <= most, f"be at most half of the {shape.patches} patches")

    def at_keep_rate(self, keep_rate: float | tuple[float, ...]) -> Reducer:
        raise InputError(f"ToCom has no keep rate: expected r, from 0 to {MOST}; got {keep_rate}")

    def variants(self, shape: ViTShape) -> Sequence[Reducer]:
        return [dataclasses.replace(self, r=r) for r in range(1, MOST + 1)]

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        return self.merger.block_plan(layer, n, shape)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        # The scale, and the two products that make what is added to a kernel.
        start, stop = self.channels
        own = 2 * (stop - start) * shape.width * (shape.width + 1)
        return own + self.merger.macs(layer, n, shape)

    def key_weight(
        self, state: TokenState, context: BlockContext
    ) -> Float[Array, "b t"] | KeyMask | AttentionMap | None:
        return self._merging(context).key_weight(state, context)

    def after_attention(self, state: TokenState, context: BlockContext) -> TokenState:
        return self._merging(context).after_attention(state, context)

    def _merging(self, context: BlockContext) -> Reducer:
        return STUDENT if context.train else self.merger

    def of_teacher(self) -> Reducer:
        return TEACHER

    @property
    def channels(self) -> tuple[int, int]:
        """Where the channels between the two maps begin and end that are not switched off."""
        group, few, many = self.dim // MOST, *sorted((self.r, self.source_r))
        return self.dim - group * many, self.dim - group * few

    def qkv_update(self, context: BlockContext) -> Float[Array, "d 3*d"] | None:
        own, factor, inner = context.weights[stage_name(context.layer)], self.scale, slice(None)
        if context.train:
            from_end, group = jnp.arange(self.dim, 0, -1), self.dim // MOST
            own_r, source = (from_end <= group * r for r in STUDENT.pair(context))
            factor *= own_r.astype(jnp.float32) - source
        elif self.r == self.source_r:
            return None
        else:
            inner = slice(*self.channels)
            factor *= 1 if self.r > self.source_r else -1
        q, v = (_product(own[part], inner, factor) for part in "qv")
        return jnp.concatenate([q, jnp.zeros_like(q), v], axis=1)

    def folded(self) -> Reducer:
        return self.merger

    def init(self, key: Array, shape: ViTShape) -> Weights:
        """Fresh weights, which correct nothing yet."""

        def pair(key: Array) -> Weights:
            down = jax.nn.initializers.lecun_normal()(key, (shape.width, self.dim))
            return {"down": {"kernel": down}, "up": {"kernel": jnp.zeros(down.shape[::-1])}}

        return {
            stage_name(layer): {
                part: pair(jax.random.fold_in(key, 2 * layer + i)) for i, part in enumerate("qv")
            }
            for layer in range(shape.depth)
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        names = {
            f"attn.{part}_tocom.adapter_{way}.weight": f"{part}/{way}/kernel"
            for part in ("q", "v")
            for way in ("down", "up")
        }
        return import_stages(self, arrays, "blocks", names)


def _product(maps: Weights, inner: slice, factor: Any) -> Float[Array, "d d"]:
    """What two maps with some channels between them, times a factor, are as one."""
    down, up = maps["down"]["kernel"][:, inner], maps["up"]["kernel"][inner]
    return jnp.matmul(factor * down, up, precision=jax.lax.Precision.HIGHEST)
