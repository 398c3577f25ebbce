"""The vision transformer: DeiT's architecture with a place for a token reducer in every block.

Touvron et al., "Training data-efficient image transformers", ICML 2021 (arXiv 2012.12877).
Parameter names are timm's, so that conversion is a table both ways.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tdm_jax.errors import InputError
from tdm_jax.models.attention import Attention
from tdm_jax.models.info import Info, Intermediate, Stage
from tdm_jax.models.layers import Dense, LayerNorm, Mlp, PatchEmbed, init
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.ops.gathering import weighted_sum
from tdm_jax.reduction import BlockContext, BlockPlan, Reducer, ViTShape, plan
from tdm_jax.reduction.token_state import TokenState

Dtype = Any


class Block(nn.Module):
    """Pre-norm transformer block, with the reducer's hooks around its parts."""

    num_heads: int
    mlp_hidden: int
    layer_norm_eps: float
    drop_path: float
    reducer: Reducer
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, state: TokenState, context: BlockContext) -> TokenState:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(self.layer_norm_eps, self.dtype, name=name)

        def residual(x: Array, y: Array) -> Array:
            # Drop path: the whole branch of an image at once.
            drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2))
            return x + drop(y, deterministic=not context.train)

        state = self.reducer.before_block(state, context)
        x = state.sequence()
        attention = Attention(self.num_heads, state.prefix.shape[1], self.dtype, name="attn")
        y, view = attention(norm("norm1")(x), self.reducer.key_weight(state, context))
        context = context.replace(attention=view)
        state = self.reducer.after_attention(state.with_sequence(residual(x, y)), context)
        x = state.sequence()
        y = Mlp(self.mlp_hidden, self.dtype, name="mlp")(norm("norm2")(x))
        return self.reducer.after_block(state.with_sequence(residual(x, y)), context)


class VisionTransformer(nn.Module):
    """A (distilled) vision transformer whose tokens a reducer may thin out.

    Attributes:
      image_size: height and width in pixels.
      patch_size: side of a square patch; must divide both.
      width: channels of a token.
      depth: blocks.
      num_heads: must divide the width.
      num_classes: logits.
      in_channels: of the images.
      mlp_ratio: hidden channels of the MLP over the width.
      distilled: whether there is a distillation token with a head of its own.
      class_token: without one, the head reads the mean over the patches.
      num_registers: register tokens, without position embedding.
      layer_norm_eps: 1e-6 in DeiT.
      drop_path: of the last block; falls linearly to 0 at the first.
      dtype: of the computation; parameters are float32.
      remat: recompute each block in the backward pass.
      reducer: what thins out the tokens.
      preprocessing: how its images are prepared; None where nobody has said so.
    """

    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    num_classes: int
    in_channels: int = 3
    mlp_ratio: float = 4.0
    distilled: bool = False
    class_token: bool = True
    num_registers: int = 0
    layer_norm_eps: float = 1e-6
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32
    remat: bool = False
    reducer: Reducer = Reducer()
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads", "num_classes", "in_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if len(self.image_size) != 2 or any(
            side < 1 or side % self.patch_size for side in self.image_size
        ):
            raise InputError(
                f"image_size must be (height, width), multiples of patch_size {self.patch_size}; "
                f"got {tuple(self.image_size)}"
            )
        if self.width % self.num_heads:
            raise InputError(
                f"num_heads must divide the width {self.width}; got {self.num_heads} heads"
            )
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path must be in [0, 1); got {self.drop_path}")
        if self.distilled and not self.class_token:
            raise InputError("a distilled model needs its class token; got class_token=False")
        self.reducer.check(self.shape)
        plan(self.reducer, self.shape)

    @property
    def shape(self) -> ViTShape:
        """What a reducer, and the cost model, may know of this transformer."""
        return ViTShape(
            grid=(self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size),
            depth=self.depth,
            width=self.width,
            num_heads=self.num_heads,
            prefix=int(self.class_token) + int(self.distilled) + self.num_registers,
            class_token=self.class_token,
        )

    @property
    def mlp_hidden(self) -> int:
        """Channels between the MLP's two maps."""
        return round(self.width * self.mlp_ratio)

    @property
    def schedule(self) -> tuple[BlockPlan, ...]:
        """Patch tokens in every block, known before anything is traced."""
        return plan(self.reducer, self.shape)

    @nn.compact
    def __call__(
        self,
        images: Num[Array, "b h w c"],
        *,
        train: bool = False,
        return_info: bool = False,
        intermediates: tuple[int, ...] = (),
    ) -> Any:
        """Classifies images.

        Args:
          images: normalised, NHWC.
          train: draws drop path and a stochastic method's masks (`rngs` "dropout", "reducer").
          return_info: also return an `Info`.
          intermediates: blocks, from 0, whose tokens `Info` has too.

        Returns:
          Logits [b, num_classes] in float32. A distilled model returns the mean of its two heads,
          or in training the pair (class, distillation). With `return_info`, (that, Info).

        Raises:
          InputError: the images have another size than the model, or it has no such blocks.
        """
        expected = (*self.image_size, self.in_channels)
        if images.shape[1:] != expected:
            raise InputError(
                f"images must be [batch, {', '.join(map(str, expected))}]; got {images.shape}"
            )
        if intermediates and not return_info:
            raise InputError("intermediates are part of Info: expected return_info=True with them")
        if not set(intermediates) <= set(range(self.depth)):
            raise InputError(
                f"intermediates must be blocks from 0 to {self.depth - 1}; got {intermediates}"
            )
        state = self._embed(images, keep_dropped=return_info)
        states = [state]
        weights = (
            self.param("reducer", self.reducer.init, self.shape) if self.reducer.learned else {}
        )
        key = self.make_rng("reducer") if self.has_rng("reducer") else None
        for layer in range(self.depth):
            block_key = None if key is None else jax.random.fold_in(key, layer)
            context = BlockContext(layer, self.shape, train, weights, block_key)
            state = self._block(layer)(state, context)
            if return_info:
                states.append(state)
        state = self.reducer.finish(state, self.shape)
        norm = LayerNorm(self.layer_norm_eps, self.dtype, name="norm")
        features = norm(state.sequence())
        out = self._heads(features, state, train)
        if not return_info:
            return out
        dropped: Any = state.dropped_values  # kept for Info
        return out, self._info(states, state, features, norm(dropped), intermediates)

    def _info(
        self,
        states: list[TokenState],
        final: TokenState,
        features: Float[Array, "b t d"],
        dropped_values: Float[Array, "b p d"],
        intermediates: tuple[int, ...],
    ) -> Info:
        before, after = states[:-1], states[1:]
        counts = enumerate(state.count for state in before)
        acting = [layer for layer, n in counts if self.reducer.acts(layer, n, self.shape)]
        return Info(
            token_counts=tuple(state.count for state in after),
            features=features,
            assign=final.assign,
            size=final.size,
            kind=final.kind,
            valid=final.valid,
            dropped_values=dropped_values,
            stages=tuple(Stage.of(layer, after[layer]) for layer in acting),
            intermediates=tuple(Intermediate.of(layer, after[layer]) for layer in intermediates),
            carry=final.carry,
            prefix=self.shape.prefix,
        )

    def _embed(self, images: Array, keep_dropped: bool) -> TokenState:
        tokens = PatchEmbed(self.patch_size, self.width, self.dtype, name="patch_embed")(images)
        b, p, d = tokens.shape
        placed = self.shape.prefix - self.num_registers
        position = self.param("pos_embed", init, (1, placed + p, d)).astype(self.dtype)
        prefix = []
        names = ["cls_token"] * self.class_token + ["dist_token"] * self.distilled
        for i, name in enumerate(names):
            token = self.param(name, init, (1, 1, d)).astype(self.dtype)
            prefix.append(token + position[:, i : i + 1])
        if self.num_registers:
            registers = self.param("reg_token", init, (1, self.num_registers, d))
            prefix.append(registers.astype(self.dtype))
        front = jnp.concatenate(prefix, axis=1) if prefix else jnp.zeros((1, 0, d), self.dtype)
        return TokenState.start(
            jnp.broadcast_to(front, (b, *front.shape[1:])),
            tokens + position[:, placed:],
            keep_dropped,
        )

    def _block(self, layer: int) -> nn.Module:
        return (nn.remat(Block) if self.remat else Block)(
            num_heads=self.num_heads,
            mlp_hidden=self.mlp_hidden,
            layer_norm_eps=self.layer_norm_eps,
            drop_path=self.drop_path * layer / max(self.depth - 1, 1),
            reducer=self.reducer,
            dtype=self.dtype,
            name=f"blocks_{layer}",
        )

    def _heads(self, features: Array, state: TokenState, train: bool) -> Any:
        def head(name: str, x: Array) -> Array:
            return Dense(self.num_classes, dtype=self.dtype, name=name)(x).astype(jnp.float32)

        if not self.class_token:
            # The mean over patches, not tokens: a token counts as often as it stands for one.
            size = state.size if state.valid is None else state.size * state.valid
            # A mask drawn in training may hide all of them.
            share = size / jnp.maximum(size.sum(axis=-1, keepdims=True), 1)
            patches = features[:, self.shape.prefix :]
            return head("head", weighted_sum(share[..., None], patches)[:, 0])
        logits = head("head", features[:, 0])
        if not self.distilled:
            return logits
        distilled = head("head_dist", features[:, 1])
        return (logits, distilled) if train else (logits + distilled) / 2


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
