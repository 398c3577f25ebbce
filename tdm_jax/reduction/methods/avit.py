"""A-ViT: Adaptive Tokens for Efficient Vision Transformer (Yin et al., CVPR 2022).

arXiv 2112.07658. After every block l each token k, the class token like any other, has a halting
score from the first channel of its value, `h_k^l = sigmoid(scale * y_k[0] - center)`, 1 after the
last block. It halts at the first block N_k where the scores sum to `1 - eps`. What the head reads
is the sum over blocks

    o_k = sum_(l < N_k) h_k^l y_k^l + r_k y_k^(N_k),   r_k = 1 - sum_(l < N_k) h_k^l

Halted tokens are zero and masked out of the attention. There are no weights of its own, but a plain
checkpoint has not learned to halt: it must be trained with the `losses`, the ponder cost
`mean_k (N_k + r_k)` and the divergence of the mean halting scores from a Gaussian over the depth.

Which tokens halt when differs from image to image, shapes must not: all patches stay, masked, or,
with `counts` (see `tdm_jax.calibrate`), the slots shrink from block to block. Where an image has
more tokens left than slots, those with the smallest remainder halt early; where it has fewer, the
rest is masked. While all fit, the result is the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops.gathering import gather_tokens, inverse_index
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, BlockPlan, Probe, Reducer, ViTShape, require
from tdm_jax.reduction.schedules import falls
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class AViT(Reducer):
    """Halts tokens one by one, and answers with a weighted sum over the blocks.

    Attributes:
      scale: of the halting score's argument (the authors' gate_scale).
      center: the score is 0.5 where `scale * y[0]` reaches it (gate_center); None for the authors'
        30 up to the width 192 of DeiT-T, and 75 beyond.
      eps: what may be missing from 1 at the halt.
      ponder_weight: of the ponder loss.
      prior_weight: of the divergence from the depth prior.
      prior_depth: the prior's mean, as a share of the depth; its standard deviation is one block.
      counts: patch tokens that may go on after each block but the last; None for all.
    """

    scale: float = 10.0
    center: float | None = None
    eps: float = 0.01
    ponder_weight: float = 5e-4
    prior_weight: float = 1e-3
    prior_depth: float = 2 / 3
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(self, "scale", self.scale > 0, "be above 0")
        require(self, "eps", 0 < self.eps < 1, "be in (0, 1)")
        require(self, "prior_depth", 0 <= self.prior_depth <= 1, "be in [0, 1]")
        require(self, "counts", falls(self.counts or ()), "be at least 1 and must not rise")

    def check(self, shape: ViTShape) -> None:
        if self.counts is None:
            return
        before = shape.depth - 1
        each = f"have one number for each of the {before} blocks before the last"
        require(self, "counts", len(self.counts) == before, each)
        fits = max(self.counts, default=0) <= shape.patches
        require(self, "counts", fits, f"be at most the {shape.patches} patches")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def has_losses(self) -> bool:
        return True

    @property
    def rewrites_prefix(self) -> bool:
        return True  # by its mean over the blocks

    def calibrated(self, probe: Probe, quantile: float) -> Reducer:
        counts = probe.token_counts(dataclasses.replace(self, counts=None), quantile)
        # All tokens have halted after the last block, and all patches are back.
        return dataclasses.replace(self, counts=counts[:-1])

    def block_plan(self, layer: int, n: int, shape: ViTShape) -> BlockPlan:
        if layer == shape.depth - 1:
            return BlockPlan(n, n, shape.patches)
        return BlockPlan(n, n, n if self.counts is None else min(n, self.counts[layer]))

    def acts(self, layer: int, n: int, shape: ViTShape) -> bool:
        return True

    def macs(self, layer: int, n: int, shape: ViTShape) -> int:
        # The weighted output, and the score's scale.
        return (n + shape.prefix) * (shape.width + 1)

    def key_weight(self, state: TokenState, context: BlockContext) -> Float[Array, "b t"] | None:
        if state.valid is None:
            return None
        return jnp.concatenate(
            [state.carry["alive"][:, : context.shape.prefix], state.valid], axis=1
        )

    def after_block(self, state: TokenState, context: BlockContext) -> TokenState:
        s, patches = context.shape.prefix, context.shape.patches
        carry = state.carry or _start(state, patches)
        alive, remainder = carry["alive"], carry["remainder"]
        # On the full grid: a patch that has halted reads some token or other, with weight 0.
        grid = state.tokens
        if state.count < patches:
            grid = gather_tokens(grid, jnp.maximum(state.assign, 0))
        value = jnp.concatenate([state.prefix, grid], axis=1).astype(jnp.float32)
        score = jax.nn.sigmoid(self.scale * value[..., 0] - self._center(context.shape))
        halting = (alive * score)[:, s:].mean(axis=1, keepdims=True)

        last = context.layer == context.shape.depth - 1
        goes_on = jnp.zeros_like(alive)
        if not last:
            goes_on = alive * (remainder - score > self.eps)
        slots = self.block_plan(context.layer, state.count, context.shape).out
        index = jnp.broadcast_to(jnp.arange(patches), state.assign.shape)
        if slots < patches:
            left = jnp.where(goes_on > 0, remainder - score, -1.0)[:, s:]
            index = argtopk(jax.lax.stop_gradient(left), slots)
            fits = (inverse_index(index, patches) >= 0).astype(jnp.float32)
            goes_on = goes_on * jnp.pad(fits, ((0, 0), (s, 0)), constant_values=1.0)
        weight = alive * jnp.where(goes_on > 0, score, remainder)
        carry = {
            "output": carry["output"] + weight[..., None] * value,
            "remainder": jnp.where(goes_on > 0, remainder - score, remainder),
            "alive": goes_on,
            "depth": carry["depth"] + alive,
            "halting": jnp.concatenate([carry["halting"], halting], axis=1),
        }
        if last:
            output = carry.pop("output").astype(state.tokens.dtype)
            kept = state.dropped_values is not None
            whole = TokenState.start(output[:, :s], output[:, s:], kept)
            return whole.replace(dropped_values=state.dropped_values, carry=carry)
        valid = gather_tokens(goes_on[:, s:], index)
        tokens = grid if slots == patches else gather_tokens(grid, index)
        dropped_values = state.dropped_values
        if dropped_values is not None:
            halts = (alive > goes_on)[:, s:, None]
            dropped_values = jnp.where(halts, grid, dropped_values)
        return state.replace(
            dropped_values=dropped_values,
            tokens=tokens * valid[..., None].astype(tokens.dtype),
            prefix=state.prefix * goes_on[:, :s, None].astype(state.prefix.dtype),
            assign=jnp.where(goes_on[:, s:] > 0, inverse_index(index, patches), -1),
            size=valid,
            kind=jnp.zeros_like(index),
            valid=valid,
            carry=carry,
            moved=slots < patches,
        )

    def losses(self, info: Any, logits: Any, labels: Any, teacher: Any = None) -> dict[str, Array]:
        ponder = (info.carry["depth"] + info.carry["remainder"]).mean()
        halting = info.carry["halting"].mean(axis=0)
        return {
            "ponder": self.ponder_weight * ponder,
            "depth_prior": self.prior_weight * divergence(halting, self.prior_depth),
        }

    def _center(self, shape: ViTShape) -> float:
        if self.center is not None:
            return self.center
        return 30.0 if shape.width <= 192 else 75.0


def divergence(halting: Float[Array, "l"], prior_depth: float) -> Float[Array, ""]:
    """Kullback-Leibler divergence of the halting scores' distribution over the depth from a prior.

    `sum_l p_l log(p_l / q_l)` with p the Gaussian around block `prior_depth * depth` with standard
    deviation 1, and q the halting scores; both are made to sum to 1 first.

    Args:
      halting: mean halting score of each block.
      prior_depth: the prior's mean as a share of the depth.
    """
    depth = halting.shape[0]
    prior = jax.nn.softmax(-0.5 * (jnp.arange(depth) - prior_depth * depth) ** 2)
    share = halting / jnp.maximum(halting.sum(), 1e-18)
    # The authors' bounds: an unused block must not push without limit.
    share = jnp.clip(share, 0.01, 0.99)
    return (jax.scipy.special.xlogy(prior, prior) - prior * jnp.log(share)).sum()


def _start(state: TokenState, patches: int) -> dict[str, Array]:
    b, s, d = state.prefix.shape
    ones = jnp.ones((b, s + patches), jnp.float32)
    return {
        "output": jnp.zeros((b, s + patches, d), jnp.float32),
        "remainder": ones,
        "alive": ones,
        "depth": jnp.zeros_like(ones),
        "halting": jnp.zeros((b, 0), jnp.float32),
    }
