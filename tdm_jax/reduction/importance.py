"""How important a patch token is: what a method ranks tokens by.

All scores are positive, and those that can weigh a merge sum to at most 1 over the tokens. With n
tokens of d channels in h heads:

    | name | importance | cost beside the model's own | needs |
    |---|---|---|---|
    | "class" | attention of the class token, mean over heads (EViT, TDM) | O(n d) | class token |
    | "value" | the same of all heads, times the norm of its value (PPT) | O(n d) | class token |
    | "head_value" | the same head by head (ATS) | O(n d) | class token |
    | "received" | attention that a token receives, summed (K-Medoids) | O(n^2 d), n x n map | |
    | "mean" | its share of all that is received | O(n^2 d), and the n x n map | |
    | "key_norm" | share of its key's norm, without its position | O(n d) | |
    | "pool" | attention of the pooling head's query, mean over heads | O(n d h) | pooling head |
    | "shift" | share of the norm of what the MLP of the block before adds | O(n d), no map | |
    | "chance" | a number drawn for each token | | |

The shift is Representation Shift (arXiv 2508.00367), `||F(x) - x||_2` with F the MLP and its
residual, which is the norm of what the MLP adds, layer scale included: tokens that it hardly
changes go first. Methods that learn a score have their own (`methods`).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.parts import Part, Scores
from tdm_jax.reduction.token_state import TokenState


class Importance(Part):
    """Ranks the patch tokens of a stage."""

    # What the transformer must have, in words, and what of a block it is measured by: "tokens", its
    # "attention", or the "update" by the MLP of the block before.
    needs: ClassVar[str] = ""
    reads: ClassVar[str] = "attention"
    # Whether it is learned by masking tokens in training (`learned`), and whether kept tokens pass
    # its gradient on by a factor of 1.
    masks: ClassVar[bool] = False
    straight_through: ClassVar[bool] = False

    def for_model(self, shape: ViTShape) -> "Importance":
        """What this is in a given transformer."""
        return self

    def fits(self, shape: ViTShape) -> bool:
        """Whether a transformer has what this needs."""
        return True

    def macs(self, n: int, shape: ViTShape) -> int:
        """Multiply-adds of n tokens' scores, by torchprofile's convention."""
        return 0

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        """The scores, in float32, given a context with attention.

        Args:
          state: the tokens.
          context: of the stage, or, for a stage before its block, of the block before.
          weights: the stage's own, if there are any.
        """
        raise NotImplementedError

    def priority(self, score: Float[Array, "b n"], count: int) -> Float[Array, "b n"]:
        """By what the `count` most important tokens are chosen, if not by the score itself."""
        return score

    def mask(
        self, state: TokenState, context: BlockContext, weights: Weights, share: float
    ) -> TokenState:
        """One stage in training: all slots stay, `valid` says which take part.

        Args:
          state: the tokens; their first slots are the image's patches, in order.
          context: of the stage.
          weights: of the stage.
          share: of the patches, that inference will keep here.
        """
        raise NotImplementedError

    def losses(
        self, title: str, info: Any, logits: Any, labels: Any, teacher: Any
    ) -> dict[str, Array]:
        """What it adds to the training objective of a method, see `Reducer.losses`."""
        return {}


class ClassAttention(Importance):
    """Attention of the class token, averaged over heads."""

    needs = "a class token"

    def fits(self, shape: ViTShape) -> bool:
        return shape.class_token

    def macs(self, n: int, shape: ViTShape) -> int:
        return n

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        return _attention(context).class_row().mean(axis=1)


class ValueNorm(ClassAttention):
    """Class attention of all heads, times the norm of the token's value."""

    def macs(self, n: int, shape: ViTShape) -> int:
        # The squares of the values, and attention times norm in each head.
        return n * shape.width + n * shape.num_heads

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        attention = _attention(context)
        values = attention.values().astype(jnp.float32)
        # No norm has a gradient at 0.
        norm = jnp.sqrt(jnp.maximum((values * values).sum(axis=(2, 3)), 1e-18))
        return share(attention.class_row().sum(axis=1) * norm)


class HeadValueNorm(ValueNorm):
    """Class attention times the norm of the token's value, head by head."""

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        attention = _attention(context)
        values = attention.values().astype(jnp.float32)
        norm = jnp.sqrt((values * values).sum(axis=-1))
        row, exact = attention.class_row(), jax.lax.Precision.HIGHEST
        score = jnp.einsum("bhn,bnh->bn", row, norm, precision=exact)
        if state.valid is not None:
            score = score * state.valid
        return score / (score.sum(axis=-1, keepdims=True) + 1e-6)


class Received(Importance):
    """Attention that a token receives, summed over heads and queries."""

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        return _attention(context).received()


class MeanReceived(Received):
    """Share of all attention that a token receives."""

    def macs(self, n: int, shape: ViTShape) -> int:
        return n

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        # Each query hands out 1 per head; without a class token their number is n.
        return share(super().measure(state, context, weights))


class KeyNorm(Importance):
    """Share of its key's norm."""

    def macs(self, n: int, shape: ViTShape) -> int:
        return n * shape.width

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        keys = _attention(context).keys().astype(jnp.float32)
        return share(jnp.sqrt((keys * keys).sum(axis=(2, 3))))


class PoolingAttention(Importance):
    """Attention of the pooling head's query."""

    needs = "a pooling head"
    reads = "tokens"

    def fits(self, shape: ViTShape) -> bool:
        return shape.pool == "map"

    def macs(self, n: int, shape: ViTShape) -> int:
        d, heads = shape.width, shape.num_heads
        # The norm, the products with each head's query, and the mean over heads.
        own = n * (d + d * heads + 1)
        # The queries are folded into the keys' map, with the norm's scale, once: where all are.
        return own + (2 * d * d + 2 * d * heads if n == shape.patches else 0)

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        query: Any = context.pooling
        return query(state.tokens).mean(axis=1)


class Shift(Importance):
    """Share of the norm of what the MLP of the block before added."""

    reads = "update"

    def macs(self, n: int, shape: ViTShape) -> int:
        return n * shape.width

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        given: Any = context.update  # there is one after the block
        update = given.astype(jnp.float32)
        # Bounded below: no norm has a gradient at 0.
        return share(jnp.sqrt(jnp.maximum((update * update).sum(axis=-1), 1e-18)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance(Importance):
    """A number drawn for each token of each image.

    Attributes:
      seed: of the draws, where the caller gives no key.
    """

    reads = "tokens"

    seed: int = 0

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        key = context.key
        if key is None:
            key = jax.random.fold_in(jax.random.key(self.seed), context.layer)
        return jax.random.uniform(key, state.tokens.shape[:2])


class Preferred(Importance):
    """What ranks the tokens where nobody says it: "class", without a class token "mean"."""

    def for_model(self, shape: ViTShape) -> Importance:
        return ClassAttention() if shape.class_token else MeanReceived()


IMPORTANCES: dict[str, Importance] = {
    "class": ClassAttention(),
    "value": ValueNorm(),
    "head_value": HeadValueNorm(),
    "received": Received(),
    "mean": MeanReceived(),
    "key_norm": KeyNorm(),
    "pool": PoolingAttention(),
    "shift": Shift(),
    "chance": Chance(),
}


def check_importance(title: str, part: Importance, shape: ViTShape) -> None:
    """Raises InputError if a transformer has not what a score needs."""
    if part.fits(shape):
        return
    fitting = [name for name, other in IMPORTANCES.items() if other.fits(shape)]
    names = [name for name, other in IMPORTANCES.items() if other == part]
    named = f"importance {names[0]!r}" if names else "its own importance"
    raise InputError(
        f"{title}: {named} needs {part.needs} and the model has none; expected "
        f"importance={', '.join(map(repr, fitting[:-1]))} or {fitting[-1]!r}"
    )


def share(value: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Each value's share of their sum."""
    return value / jnp.maximum(value.sum(axis=-1, keepdims=True), 1e-18)


def _attention(context: BlockContext) -> Any:
    return context.attention  # there is one at a stage, and behind a block
