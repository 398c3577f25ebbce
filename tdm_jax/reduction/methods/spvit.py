"""SPViT: soft token pruning (Kong et al., ECCV 2022, arXiv 2112.13890).

Before blocks 3, 6 and 9 (from 0) every head has a DynamicViT predictor for its slice of d/H
channels; a token's keep score is the mean of the heads' keep probabilities. With `gate` the heads
are weighted by a squeeze-and-excitation branch: the slices' means through
`sigmoid(Linear_H(GELU(Linear_{H/2}(.))))`, normalised to sum to 1 (equations 5 to 7).

The tokens that a stage drops become one package token, their mean weighted by keep score
(equation 8). Packages stay to the end, are never scored again, but take part in the predictors'
means. Stage s keeps the `floor(patches * keep_rate^(s+1))` highest scores and has s + 1 packages;
the order is kept tokens by score, packages by age.

Settled here: the original draws Gumbel noise in evaluation too, and its drawn masks decide how many
stay; ours takes the top scores. Its program averages log-probabilities for the decision and
probabilities for the package, and leaves the package's sum unnormalised in one version; the paper's
single averaged probability and normalised mean are what this does. Training is DynamicViT's: masks
over all patches, the ratio loss, and distillation from the unreduced model.
"""

import dataclasses
import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens, inverse_index, weighted_sum
from tdm_jax.ops.merging import weighted_mean
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, KeyMask, ViTShape, Weights, plan
from tdm_jax.reduction.importance import Importance
from tdm_jax.reduction.learned import gumbel_keep, key_mask, recorded, still_there, training_key
from tdm_jax.reduction.methods.dyvit import ORIGINAL, Predicted, Predictor, predictor_macs
from tdm_jax.reduction.original_weights import import_stages, stage_name
from tdm_jax.reduction.parts import Scores
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.stages import StageReducer
from tdm_jax.reduction.token_state import TokenState, with_fused


class HeadScorer(nn.Module):
    """A token's probability to stay, the mean of one predictor per head."""

    num_heads: int
    gate: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], there: Float[Array, "b n"]) -> Float[Array, "b n"]:
        slices = jnp.split(x.astype(jnp.float32), self.num_heads, axis=-1)
        keep = [
            jnp.exp(Predictor(name=f"head_{i}")(piece, there)[..., 0])
            for i, piece in enumerate(slices)
        ]
        keep = jnp.stack(keep, axis=-1)  # [b, n, h]
        if not self.gate:
            return keep.mean(axis=-1)

        def layer(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, kernel_init=nn.initializers.truncated_normal(0.02), name=name)

        means = jnp.stack([piece.mean(axis=-1) for piece in slices], axis=-1)
        hidden = nn.gelu(layer(self.num_heads // 2, "squeeze")(means), approximate=False)
        weight = nn.sigmoid(layer(self.num_heads, "excite")(hidden))
        return (keep * weight).sum(axis=-1) / weight.sum(axis=-1)


# Where the original program keeps the gate.
_GATE = {
    "senet.0.weight": "squeeze/kernel",
    "senet.0.bias": "squeeze/bias",
    "senet.2.weight": "excite/kernel",
    "senet.2.bias": "excite/bias",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPredicted(Importance):
    """The probability to stay, the mean of one predictor per head.

    Attributes:
      gate: whether a learned gate weighs the heads.
      ratio_weight: of the loss that holds training to the planned share of tokens.
      distill_weight: of each of the two losses against the unreduced model, if there is one.
    """

    learned: ClassVar[bool] = True
    reads: ClassVar[str] = "tokens"

    gate: bool = False
    ratio_weight: float = 2.0
    distill_weight: float = 0.5

    def check(self, title: str, stages: tuple[int, ...], shape: ViTShape) -> None:
        head = shape.width // shape.num_heads
        if head < 4:
            raise InputError(f"{title} needs heads of at least 4 channels; got {head}")
        if self.gate and shape.num_heads < 2:
            raise InputError(f"{title}'s gate needs at least 2 heads; got {shape.num_heads}")

    def init(self, key: Array, shape: ViTShape) -> Weights:
        tokens, there = jnp.zeros((1, 1, shape.width)), jnp.ones((1, 1))
        return self._scorer(shape).init(key, tokens, there)["params"]

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        matches = [re.search(r"in_conv\.(\d+)\.", name) for name in arrays]
        heads = 1 + max((int(match[1]) for match in matches if match), default=0)
        names = {
            name.replace("_conv.", f"_conv.{head}."): f"head_{head}/{path}"
            for head in range(heads)
            for name, path in ORIGINAL.items()
        }
        gate = _GATE if self.gate else {}
        return import_stages(owner, arrays, "score_predictor", names | gate)

    def macs(self, n: int, shape: ViTShape) -> int:
        heads = shape.num_heads
        scores = heads * predictor_macs(n, shape.width // heads)
        # The slices' means, two linear maps, and the weighting.
        gate = n * (heads + 2 * heads * (heads // 2) + heads)
        return scores + (gate if self.gate else 0)

    def _scorer(self, shape: ViTShape) -> HeadScorer:
        return HeadScorer(shape.num_heads, self.gate, parent=None)

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        scorer: Any = self._scorer(context.shape)
        return scorer.apply({"params": weights}, state.tokens, still_there(state))

    def losses(
        self, title: str, info: Any, logits: Any, labels: Any, teacher: Any
    ) -> dict[str, Array]:
        as_dynamicvit = Predicted(
            ratio_weight=self.ratio_weight, distill_weight=self.distill_weight
        )
        return as_dynamicvit.losses(title, info, logits, labels, teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPViT(StageReducer):
    """Keeps the tokens that score highest and packs the others into one token a stage.

    Attributes:
      importance: of the tokens.
    """

    learned: ClassVar[bool] = True

    schedule: Schedule = Schedule(of_image=True)
    importance: HeadPredicted = HeadPredicted()

    @property
    def before(self) -> bool:
        return True

    def check(self, shape: ViTShape) -> None:
        super().check(shape)
        self.importance.check(self.title, self.stages(shape), shape)

    def packages(self, stage: int, shape: ViTShape) -> int:
        """Package tokens that reach a stage."""
        n, packages = shape.patches, 0
        for earlier in range(stage):
            left = self.stage_count(earlier, n, shape)
            packages += left < n
            n = left
        return packages

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        packages, schedule = self.packages(stage, shape), self.schedule
        if not self.by_rate:
            count = schedule.count(stage, n, shape)
            if count < n and count < packages + 2:
                raise InputError(
                    f"SPViT leaves at least {packages + 2} tokens at stage {stage}, "
                    f"{packages + 1} of them packages; got {count}"
                )
            return count
        kept = max(schedule.of_all(stage, shape.patches), 1)
        if kept >= n - packages - 1:
            return n  # With nothing, or a single token, left over there is nothing to pack.
        return schedule.rounded(kept + packages + 1, n)

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        left = self.block_plan(layer, n, shape).out
        if left == n:
            return 0
        return self.importance.macs(n, shape) + (n - left + 1) * shape.width

    def init(self, key: Array, shape: ViTShape) -> Weights:
        keys = jax.random.split(key, len(self.stages(shape)))
        return {
            stage_name(stage): self.importance.init(key, shape) for stage, key in enumerate(keys)
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        return self.importance.import_weights(self, arrays)

    def _score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        weights = context.weights[stage_name(self.stage(context))]
        return self.importance.measure(state, context, weights)

    def key_weight(self, state: TokenState, context: BlockContext) -> KeyMask | None:
        return None if state.valid is None else key_mask(state)

    def before_block(self, state: TokenState, context: BlockContext) -> TokenState:
        if not context.train:
            return super().before_block(state, context)
        shape, layer = context.shape, context.layer
        blocks = plan(self, shape)
        out, arriving = blocks[layer].out, blocks[layer - 1].out if layer else shape.patches
        if out == arriving:
            return state
        packages = self.packages(self.stage(context), shape) + 1
        return self._mask(state, context, (out - packages) / shape.patches)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        stage, n = self.stage(context), state.count
        packages = self.packages(stage, context.shape)
        own, total = n - packages, self.stage_count(stage, n, context.shape)
        kept = total - packages - 1
        score = self._score(state, context)[:, :own]
        index = argtopk(score, kept)
        place = inverse_index(index, own)
        tokens = state.tokens[:, :own]
        package = weighted_mean(tokens, jnp.where(place < 0, 0, -1), score, 1)
        older = jnp.broadcast_to(kept + jnp.arange(packages), (place.shape[0], packages))
        return state.replace_tokens(
            jnp.concatenate([gather_tokens(tokens, index), state.tokens[:, own:], package], axis=1),
            jnp.concatenate([jnp.where(place < 0, total - 1, place), older], axis=1),
            with_fused(
                jnp.concatenate([gather_tokens(state.kind, index), state.kind[:, own:]], axis=1)
            ),
        )

    def _mask(self, state: TokenState, context: BlockContext, share: float) -> TokenState:
        """One stage in training: all slots stay, and what is dropped adds a package."""
        n, own = state.count, context.shape.patches
        there, tokens = still_there(state), state.tokens[:, :own]
        score = self._score(state, context)[:, :own]
        odds = jnp.log(jnp.clip(jnp.stack([score, 1 - score], axis=-1), 1e-6))
        keep = gumbel_keep(training_key("SPViT", context.key), odds) * there[:, :own]
        dropped = there[:, :own] - keep
        weight = dropped * score
        weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-6)
        package = weighted_sum(weight[..., None], tokens)
        # Where nothing was dropped there is no package.
        exists = (dropped > 0.5).any(axis=1, keepdims=True).astype(keep.dtype)
        slots = jnp.broadcast_to(jnp.arange(n), there.shape)
        moved = jnp.where(keep > 0.5, slots[:, :own], jnp.where(dropped > 0.5, n, -1))
        state = state.replace_tokens(
            jnp.concatenate([state.tokens, package], axis=1),
            jnp.concatenate([moved, slots[:, own:]], axis=1),
            with_fused(state.kind),
            valid=jnp.concatenate([keep, there[:, own:], exists], axis=1),
        )
        return recorded(state, "excess", keep.mean(axis=1) - share)

    def losses(self, info: Any, logits: Any, labels: Any, teacher: Any = None) -> dict[str, Array]:
        return self.importance.losses(self.title, info, logits, labels, teacher)


# Its scores with TDM's decoupling, which packs nothing and learns by what it merges.
SPVIT_TDM = Composed(
    title="SPViT with TDM",
    schedule=Schedule(of_image=True),
    place="before",
    importance=HeadPredicted(),
)
