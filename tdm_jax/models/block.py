"""A transformer block, composed from a description, with the reducer's hooks around its parts."""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from tdm_jax.models.attention import Attention, AttentionView
from tdm_jax.models.layers import LayerNorm, LayerScale, Mlp
from tdm_jax.models.rotary import Rotary
from tdm_jax.reduction import BlockContext, Reducer
from tdm_jax.reduction.token_state import TokenState

Dtype = Any


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What the families' blocks differ in; see `VisionTransformer` for what each field means."""

    num_heads: int
    mlp_hidden: int
    layer_norm_eps: float
    activation: str
    gated_mlp: bool
    mlp_norm: bool
    layer_scale: bool
    qkv_bias: str
    rotary: Rotary | None
    dtype: Dtype


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
      spec: what it is made of.
      reducer: what thins out the tokens.
      read: tokens at the front, none of them patches, that anybody reads behind the block; None
        for all. Nothing else is then computed: no hook is called behind the attention.
    """

    spec: BlockSpec
    reducer: Reducer
    read: int | None = None

    @nn.compact
    def __call__(
        self,
        state: TokenState,
        context: BlockContext,
        branches: Float[Array, "2 b"] | None = None,
    ) -> TokenState:
        """The tokens behind the block.

        Args:
          state: the tokens before it.
          context: where it stands.
          branches: factor of each image's attention and MLP, as drop path draws it; None for 1.
        """
        spec, prefix = self.spec, state.prefix.shape[1]

        def norm(name: str) -> LayerNorm:
            return LayerNorm(spec.layer_norm_eps, spec.dtype, name=name)

        def scaled(y: Array, name: str) -> Array:
            return LayerScale(name=name)(y) if spec.layer_scale else y

        def residual(x: Array, y: Array, branch: int) -> Array:
            if branches is None:
                return x + y
            return x + y * branches[branch].astype(y.dtype)[:, None, None]

        norm1 = norm("norm1")
        attention = Attention(spec.num_heads, prefix, spec.qkv_bias, spec.dtype, name="attn")

        update = self.reducer.qkv_update(context)

        def attend(
            state: TokenState, x: Array, preview: bool = False
        ) -> tuple[Array, AttentionView | None]:
            rotation = None
            if spec.rotary is not None:
                grid, channels = context.shape.grid, x.shape[-1] // spec.num_heads
                rotation = spec.rotary.rotation(state.positions(grid), grid, prefix, channels)
            weight = self.reducer.key_weight(state, context)
            return attention(
                norm1(x), weight, rotation, update, preview, None if preview else self.read
            )

        ahead = context.replace(preview=lambda state: attend(state, state.sequence(), True)[1])
        state = self.reducer.before_block(state, ahead)
        x = state.sequence()
        y, view = attend(state, x)
        context = context.replace(attention=view)
        x = residual(x[:, : self.read], scaled(y, "ls1"), 0)
        if self.read is None:
            state = self.reducer.after_attention(state.with_sequence(x), context)
            x = state.sequence()
        mlp = Mlp(
            hidden=spec.mlp_hidden,
            activation=spec.activation,
            gated=spec.gated_mlp,
            norm_eps=spec.layer_norm_eps if spec.mlp_norm else None,
            dtype=spec.dtype,
            name="mlp",
        )
        y = scaled(mlp(norm("norm2")(x)), "ls2")
        x = residual(x, y, 1)
        if self.read is not None:
            return state.replace(prefix=x)
        context = context.replace(update=y[:, prefix:])
        return self.reducer.after_block(state.with_sequence(x), context)
