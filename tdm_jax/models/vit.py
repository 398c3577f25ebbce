"""The vision transformer, with a place for a token reducer in every block.

Dosovitskiy et al., "An image is worth 16 x 16 words", ICLR 2021 (arXiv 2010.11929). What the
families (DeiT, DINOv2, SigLIP, CLIP, ...) differ in are fields; by default it is DeiT (Touvron et
al., ICML 2021, arXiv 2012.12877). Parameter names are timm's, so that conversion is a table both
ways.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from tdm_jax.errors import InputError, unknown
from tdm_jax.models.attention import key_bias
from tdm_jax.models.block import Block, BlockSpec
from tdm_jax.models.heads import POOLS, AttentionPool, PoolingQuery, mean_patch
from tdm_jax.models.info import Info, Intermediate, Stage
from tdm_jax.models.layers import Dense, LayerNorm, PatchEmbed, init
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.rotary import Rotary
from tdm_jax.ops.activations import ACTIVATIONS
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.ops.platform import in_reverse_mode, is_for_one_cpu
from tdm_jax.reduction import BlockContext, BlockPlan, Reducer, ViTShape, plan
from tdm_jax.reduction.token_state import TokenState

Dtype = Any
POSITIONS = ("all", "patches", "none")
# A CPU answers so many tokens at a time, unless all activations of a layer fit into so many bytes
# (docs/measurements.md, "Parts of a batch").
_FEWEST, _MOST, _SMALL = 768, 2304, 8 * 2**20
# How position embeddings are made to fit another grid; see `checkpoint.positions`.
INTERPOLATIONS = (
    "bicubic_antialias", "bicubic", "bicubic_offset", "bilinear", "bilinear_antialias"
)  # fmt: skip


class VisionTransformer(nn.Module):
    """A vision transformer whose tokens a reducer may thin out.

    Attributes:
      image_size: height and width in pixels.
      patch_size: side of a square patch; must divide both.
      width: channels of a token.
      depth: blocks.
      num_heads: must divide the width.
      num_classes: logits, or channels of a projection; 0 for no head: the pooled feature.
      in_channels: of the images.
      mlp_ratio: channels that the MLP's second map reads, over the width.
      distilled: whether there is a distillation token with a head of its own.
      class_token: whether there is one.
      num_registers: register tokens, without position embedding (arXiv 2309.16588).
      positions: which tokens have a learned position: "all" (of class, distillation and patches),
        "patches" or "none".
      rotary: rotary positions of the patches; None for none.
      interpolation: how the learned positions are resampled for another image size when they are
        loaded, as the family's own program does it; one of `INTERPOLATIONS`.
      patch_bias: whether the patches' map has a bias.
      pre_norm: whether the tokens are normed before the first block (CLIP).
      layer_norm_eps: of every norm.
      qkv_bias: which of queries, keys and values have a bias: "qkv", "qv", "", ...
      activation: of the MLPs, one of `ACTIVATIONS`.
      gated_mlp: SwiGLU instead of the plain MLP.
      mlp_norm: whether the MLP norms what its second map reads (EVA-02).
      layer_scale: whether each branch of a block has a learned factor by channel.
      pool: what the head reads: the class "token"; "avg", the mean of the patches; "map", a head
        that attends to all tokens; "token_avg", the first two side by side. None for the class
        token, or the mean where there is none.
      fc_norm: whether the pooled vector is normed instead of the tokens.
      head_bias: whether the head has one.
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
    positions: str = "all"
    rotary: Rotary | None = None
    interpolation: str = "bicubic_antialias"
    patch_bias: bool = True
    pre_norm: bool = False
    layer_norm_eps: float = 1e-6
    qkv_bias: str = "qkv"
    activation: str = "gelu"
    gated_mlp: bool = False
    mlp_norm: bool = False
    layer_scale: bool = False
    pool: str | None = None
    fc_norm: bool = False
    head_bias: bool = True
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32
    remat: bool = False
    reducer: Reducer = Reducer()
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads", "in_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.num_classes < 0:
            raise InputError(f"num_classes must be at least 0; got {self.num_classes}")
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
        for name, known in (
            ("activation", ACTIVATIONS),
            ("positions", POSITIONS),
            ("interpolation", INTERPOLATIONS),
            ("pool", (*POOLS, None)),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), [k for k in known if k is not None])
        self._check_composition()
        self.reducer.check(self.shape)
        plan(self.reducer, self.shape)

    def _check_composition(self) -> None:
        if self.distilled and not self.class_token:
            raise InputError("a distilled model needs its class token; got class_token=False")
        if self.distilled and (self.pooling != "token" or self.fc_norm):
            raise InputError(
                "a distilled model's heads read its two tokens: expected pool='token' without "
                f"fc_norm; got pool={self.pooling!r}, fc_norm={self.fc_norm}"
            )
        if self.pooling.startswith("token") and not self.class_token:
            raise InputError(
                f"pool={self.pooling!r} reads the class token; got class_token=False: expected "
                "pool='avg' or 'map'"
            )
        if self.fc_norm and self.pooling != "avg":
            raise InputError(f"fc_norm norms a mean: expected pool='avg'; got {self.pooling!r}")
        if self.qkv_bias not in ("", "q", "k", "v", "qk", "qv", "kv", "qkv"):
            raise InputError(f"qkv_bias must be letters of 'qkv', in order; got {self.qkv_bias!r}")
        if self.rotary is not None and self.width // self.num_heads % 4:
            raise InputError(
                "rotary positions need heads of a multiple of 4 channels; got "
                f"{self.width // self.num_heads}"
            )

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
            pool=self.pooling,
        )

    @property
    def pooling(self) -> str:
        """What the head reads."""
        return self.pool or ("token" if self.class_token else "avg")

    @property
    def read(self) -> int | None:
        """Tokens at the front of the last block's that the head reads; None if patches count too.

        Where it reads them alone, an answer computes nothing else there, unless `Info` or other
        collections are asked for.
        """
        alone = self.pooling == "token" and not self.reducer.rewrites_prefix
        return 1 + self.distilled if alone else None

    @property
    def mlp_hidden(self) -> int:
        """Channels that the MLP's second map reads."""
        return round(self.width * self.mlp_ratio)

    @property
    def block_spec(self) -> BlockSpec:
        """What every block is made of."""
        names = [field.name for field in dataclasses.fields(BlockSpec)]
        return BlockSpec(**{name: getattr(self, name) for name in names})

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
        """Answers to images.

        Args:
          images: normalised, NHWC.
          train: draws drop path and a stochastic method's masks (`rngs` "dropout", "reducer").
          return_info: also return an `Info`.
          intermediates: blocks, from 0, whose tokens `Info` has too.

        Returns:
          Logits [b, num_classes] in float32, or without a head the pooled feature. A distilled
          model returns the mean of its two answers, or in training the pair (class, distillation).
          With `return_info`, (that, Info).

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
        scope: Any = self.scope
        # Who collects what blocks say (`capture_intermediates`) asks for all tokens, too.
        whole = return_info or scope.mutable is not False
        part = images.shape[0] if train or whole else self._part(images.shape[0])
        if part != images.shape[0]:
            apply = functools.partial(self.clone(parent=None, name=None).apply, self.variables)
            answers = jax.lax.map(apply, images.reshape(-1, part, *expected))
            return answers.reshape(images.shape[0], -1)
        state = self._embed(images, keep_dropped=return_info)
        states = [state]
        weights = (
            self.param("reducer", self.reducer.init, self.shape) if self.reducer.learned else {}
        )
        key = self.make_rng("reducer") if self.has_rng("reducer") else None
        query = self._pooling_query()
        branches = self._drop_path(images.shape[0]) if train and self.drop_path else None
        read = None if whole else self.read
        for layer in range(self.depth):
            block_key = None if key is None else jax.random.fold_in(key, layer)
            context = BlockContext(layer, self.shape, train, weights, block_key, key, pooling=query)
            factors = None if branches is None else branches[layer]
            last = layer == self.depth - 1
            state = self._block(layer, read if last else None)(state, context, factors)
            if return_info:
                states.append(state)
        state = self.reducer.finish(state, self.shape)
        norm = (lambda x: x) if self.fc_norm else self._norm("norm")
        features = norm(state.sequence() if read is None else state.prefix)
        pooled = self._pooled(features, state, context)
        out = self._heads(pooled, train)
        if not return_info:
            return out
        dropped: Any = state.dropped_values  # kept for Info
        own: Any = state.details
        own = gather_tokens(state.tokens, jnp.maximum(state.assign, 0)) + own
        own = norm(jnp.where((state.assign >= 0)[..., None], own, dropped))
        return out, self._info(states, state, features, pooled, norm(dropped), own, intermediates)

    def _part(self, batch: Any) -> Any:
        """Images that a program for one CPU takes through all blocks at a time; else all."""
        # Chance goes by the whole batch.
        alone = is_for_one_cpu() and not in_reverse_mode() and not self.has_rng("reducer")
        if not alone or not isinstance(batch, int):
            return batch
        tokens = self.shape.prefix + self.shape.patches
        if batch * tokens * self.mlp_hidden * jnp.dtype(self.dtype).itemsize <= _SMALL:
            return batch
        parts = (n for n in range(1, batch + 1) if batch % n == 0)
        return max((n for n in parts if _FEWEST <= n * tokens <= _MOST), default=batch)

    def _info(
        self,
        states: list[TokenState],
        final: TokenState,
        features: Float[Array, "b t d"],
        pooled: tuple[Array, ...],
        dropped_values: Float[Array, "b p d"],
        patches: Float[Array, "b p d"],
        intermediates: tuple[int, ...],
    ) -> Info:
        before, after = states[:-1], states[1:]
        counts = enumerate(state.count for state in before)
        acting = [layer for layer, n in counts if self.reducer.acts(layer, n, self.shape)]
        return Info(
            token_counts=tuple(state.count for state in after),
            features=features,
            pooled=pooled[0] if len(pooled) == 1 else (pooled[0] + pooled[1]) / 2,
            assign=final.assign,
            size=final.size,
            kind=final.kind,
            valid=final.valid,
            dropped_values=dropped_values,
            patches=patches,
            stages=tuple(Stage.of(layer, after[layer]) for layer in acting),
            intermediates=tuple(Intermediate.of(layer, after[layer]) for layer in intermediates),
            carry=final.carry,
            prefix=self.shape.prefix,
        )

    def _embed(self, images: Array, keep_dropped: bool) -> TokenState:
        tokens = PatchEmbed(
            self.patch_size, self.width, self.patch_bias, self.dtype, name="patch_embed"
        )(images)
        b, p, d = tokens.shape
        names = ["cls_token"] * self.class_token + ["dist_token"] * self.distilled
        prefix = [self.param(name, init, (1, 1, d)).astype(self.dtype) for name in names]
        if self.positions != "none":
            placed = len(prefix) if self.positions == "all" else 0
            position = self.param("pos_embed", init, (1, placed + p, d)).astype(self.dtype)
            prefix[:placed] = [x + position[:, i : i + 1] for i, x in enumerate(prefix[:placed])]
            tokens = tokens + position[:, placed:]
        if self.num_registers:
            registers = self.param("reg_token", init, (1, self.num_registers, d))
            prefix.append(registers.astype(self.dtype))
        front = jnp.concatenate(prefix, axis=1) if prefix else jnp.zeros((1, 0, d), self.dtype)
        if self.pre_norm:
            norm = self._norm("norm_pre")
            front, tokens = norm(front), norm(tokens)
        return TokenState.start(
            jnp.broadcast_to(front, (b, *front.shape[1:])), tokens, keep_dropped
        )

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.layer_norm_eps, self.dtype, name=name)

    def _block(self, layer: int, read: int | None) -> nn.Module:
        return (nn.remat(Block) if self.remat else Block)(
            spec=self.block_spec, reducer=self.reducer, read=read, name=f"blocks_{layer}"
        )

    def _drop_path(self, batch: int) -> Float[Array, "l 2 b"]:
        """A factor for both branches of every block: 0 where an image goes without, else 1 / kept.

        One draw for all, as each is a loop of its own to compile.
        """
        kept = 1 - self.drop_path * jnp.arange(self.depth) / max(self.depth - 1, 1)
        kept = kept[:, None, None]
        uniform = jax.random.uniform(self.make_rng("dropout"), (self.depth, 2, batch))
        return (uniform < kept) / kept

    def _pooling_query(self) -> PoolingQuery | None:
        if self.pooling != "map":
            return None
        if self.is_initializing():  # the head's parameters come last
            weights = jnp.zeros((self.width, self.num_heads))
            return PoolingQuery(weights, self.layer_norm_eps)
        params = self.variables["params"]
        norm, pool = params["norm"], params["attn_pool"]
        return PoolingQuery.of(norm, pool, self.num_heads, self.layer_norm_eps)

    def _pooled(
        self, features: Array, state: TokenState, context: BlockContext
    ) -> tuple[Array, ...]:
        """What each head reads [b, width]: one vector, or two of a distilled model."""
        if self.distilled:
            return features[:, 0], features[:, 1]
        if self.pooling == "map":
            pool = AttentionPool(
                self.num_heads, self.mlp_hidden, self.activation, self.layer_norm_eps, self.dtype,
                name="attn_pool",
            )  # fmt: skip
            weight: Any = self.reducer.key_weight(state, context)  # no block's map
            return (pool(features, key_bias(weight)),)
        parts = [features[:, 0]] if self.pooling.startswith("token") else []
        if self.pooling.endswith("avg"):
            parts.append(mean_patch(features, state))
        pooled = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        return (self._norm("fc_norm")(pooled) if self.fc_norm else pooled,)

    def _heads(self, pooled: tuple[Array, ...], train: bool) -> Any:
        if self.num_classes:
            pooled = tuple(
                Dense(self.num_classes, use_bias=self.head_bias, dtype=self.dtype, name=name)(x)
                for name, x in zip(("head", "head_dist"), pooled, strict=False)
            )
        answers = tuple(x.astype(jnp.float32) for x in pooled)
        if not self.distilled:
            return answers[0]
        return answers if train else (answers[0] + answers[1]) / 2


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
