"""What two tokens are compared by when they are grouped."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tdm_jax.ops.distances import unit
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.original_weights import import_stages
from tdm_jax.reduction.parts import Part, linear
from tdm_jax.reduction.token_state import TokenState

Vectors = Float[Array, "b n k"]
_WIDE = 1024  # channels from which a learned metric is twice as wide


class Metric(Part):
    """Vectors of the patch tokens, in float32 where they are not the tokens themselves."""

    # Whether it is had of the block's attention.
    reads_attention: ClassVar[bool] = True

    def width(self, shape: ViTShape) -> int:
        """Channels of the vectors."""
        return shape.width

    def macs(self, t: int, shape: ViTShape) -> int:
        """Multiply-adds of the vectors of t tokens, prefix included."""
        return 0

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        """The vectors of all patch tokens.

        Args:
          state: the tokens.
          context: of the stage.
          weights: of the stage, where the metric is learned.
        """
        raise NotImplementedError

    def of(
        self,
        state: TokenState,
        context: BlockContext,
        weights: Weights,
        index: Int[Array, "b m"] | None,
    ) -> Float[Array, "b m k"]:
        """The vectors of the patch tokens at `index`, None for all in their order.

        They decide who joins whom, which has no gradient.
        """
        vectors = jax.lax.stop_gradient(self.of_all(state, context, weights))
        return vectors if index is None else gather_tokens(vectors, index)


class Tokens(Metric):
    """The tokens themselves."""

    reads_attention = False

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        return state.tokens

    def of(
        self,
        state: TokenState,
        context: BlockContext,
        weights: Weights,
        index: Int[Array, "b m"] | None,
    ) -> Float[Array, "b m k"]:
        fixed = jax.lax.stop_gradient(state)
        return fixed.tokens if index is None else fixed.gather(index)


class UnitTokens(Tokens):
    """The tokens scaled to length one."""

    def macs(self, t: int, shape: ViTShape) -> int:
        return t * shape.width

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        return unit(state.tokens.astype(jnp.float32))

    def of(
        self,
        state: TokenState,
        context: BlockContext,
        weights: Weights,
        index: Int[Array, "b m"] | None,
    ) -> Float[Array, "b m k"]:
        return unit(super().of(state, context, weights, index).astype(jnp.float32))


class Keys(Metric):
    """The keys, averaged over heads (ToMe)."""

    def width(self, shape: ViTShape) -> int:
        return shape.width // shape.num_heads

    def macs(self, t: int, shape: ViTShape) -> int:
        return t * self.width(shape)  # one for each mean

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        attention: Any = context.attention  # there is one at a stage
        return attention.keys().astype(jnp.float32).mean(axis=2)


class HeadKeys(Metric):
    """The keys of all heads, side by side."""

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        attention: Any = context.attention
        keys = attention.keys().astype(jnp.float32)
        return keys.reshape(*keys.shape[:2], -1)


class Inputs(Metric):
    """What the block's attention reads: the tokens behind the first norm."""

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        attention: Any = context.attention
        return attention.inputs().astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection(Metric):
    """A learned linear map of what the block's attention reads (DTEM).

    Its gradient reaches the weights alone, not the tokens.

    Attributes:
      metric_width: channels of the projection; None for a head's, or two heads' in wide models.
    """

    learned: ClassVar[bool] = True

    metric_width: int | None = None

    def validate(self, title: str) -> None:
        given = self.metric_width
        self.demand(title, "metric_width", given is None or given >= 1, "be at least 1")

    def width(self, shape: ViTShape) -> int:
        twice = 2 if shape.width >= _WIDE else 1
        return self.metric_width or twice * shape.width // shape.num_heads

    def macs(self, t: int, shape: ViTShape) -> int:
        return t * shape.width * self.width(shape)

    def init(self, key: Array, shape: ViTShape) -> Weights:
        return linear(key, shape.width, self.width(shape))

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        layers = owner.schedule.layers
        if not isinstance(layers, str):
            # The original numbers blocks and has a map in each; here each stage has one.
            arrays = {
                name.replace(f"blocks.{layer}.", f"blocks.{stage}.", 1): value
                for stage, layer in enumerate(layers)
                for name, value in arrays.items()
                if name.startswith(f"blocks.{layer}.")
            }
        names = {"attn.metric_layer.weight": "kernel", "attn.metric_layer.bias": "bias"}
        return import_stages(owner, arrays, "blocks", names)

    def of_all(self, state: TokenState, context: BlockContext, weights: Weights) -> Vectors:
        attention: Any = context.attention
        return project(attention.inputs(), weights)


def project(x: Float[Array, "b n d"], weights: Weights) -> Float[Array, "b n k"]:
    """What tokens are compared by, in float32; its gradient reaches the weights alone."""
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    product = jnp.einsum("bnd,dk->bnk", x, weights["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + weights["bias"]


METRICS: dict[str, Metric] = {
    "tokens": Tokens(),
    "unit_tokens": UnitTokens(),
    "keys": Keys(),
    "head_keys": HeadKeys(),
    "inputs": Inputs(),
    "projection": Projection(),
}
