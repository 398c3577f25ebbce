"""EViT: Not All Patches are What You Need (Liang et al., ICLR 2022, arXiv 2202.07800).

Top-K, and one more token made of what is dropped: `sum_i a_i x_i` over the inattentive tokens, with
`a` the class attention averaged over heads, not renormalised (as the authors' program has it; the
paper's equation 3 reads the same). The fused token is the last one, and counts in the next stage's
n.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens, inverse_index, weighted_sum
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import ViTShape
from tdm_jax.reduction.methods.topk import TopK
from tdm_jax.reduction.token_state import TokenState, with_fused


@dataclasses.dataclass(frozen=True, kw_only=True)
class EViT(TopK):
    """Keeps `ceil(keep_rate * n)` attentive tokens and fuses the others into one."""

    def count(self, stage: int, n: int, patches: int) -> int:
        kept = super().count(stage, n, patches)
        # With nothing, or a single token, left over there is nothing to fuse.
        return kept + 1 if kept < n and self.merger is None else kept

    def stage_count(self, stage: int, n: int, shape: ViTShape) -> int:
        count = super().stage_count(stage, n, shape)
        if count == 1 < n:
            raise InputError("EViT leaves at least 2 tokens, the last of them fused; got 1")
        return count

    def keep_macs(self, n: int, count: int, shape: ViTShape) -> int:
        return (n - count + 1) * shape.width

    def keep(self, state: TokenState, score: Float[Array, "b n"], count: int) -> TokenState:
        index = argtopk(score, count - 1)
        place = inverse_index(index, state.count)
        left_over = jnp.where(place < 0, score, 0.0)
        fused = weighted_sum(left_over[..., None], state.tokens)
        return state.replace_tokens(
            jnp.concatenate([gather_tokens(state.tokens, index), fused], axis=1),
            jnp.where(place < 0, count - 1, place),
            with_fused(gather_tokens(state.kind, index)),
        )
