"""DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034).

Before blocks 3, 6 and 9 (from 0) a small predictor decides for each token whether it stays, from
the token itself and the mean over those that are still there:

    z = GELU(Linear_d(LN(x)));  local = z[:d/2];  global = mean over kept tokens of z[d/2:]
    (keep, drop) = log-softmax(Linear_2(GELU(Linear_{d/4}(GELU(Linear_{d/2}([local, global]))))))

Stage s of inference keeps the `floor(patches * keep_rate^(s+1))` tokens with the highest keep
score, ordered by it. Training draws hard masks by Gumbel-softmax over all tokens, under attention
that hides masked tokens from all but themselves, and adds to the classification loss

    2 * ratio + 0.5 * KL(teacher || student) + 0.5 * token distillation

where the teacher is the unreduced model. The paper squares the distance of whole tokens; as the
released program, ours is the mean over channels too. (That program's default compares softmaxed
tokens instead.)
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.importance import Importance
from tdm_jax.reduction.learned import (
    check_answers,
    gumbel_keep,
    logit_distillation,
    mask_tokens,
    ratio_loss,
    recorded,
    still_there,
    token_distillation,
    training_key,
)
from tdm_jax.reduction.original_weights import import_stages
from tdm_jax.reduction.parts import Scores
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.token_state import TokenState


class Predictor(nn.Module):
    """Scores each token from itself and the mean over the tokens that are still there."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], there: Float[Array, "b n"]
    ) -> Float[Array, "b n 2"]:
        """Log-probabilities of keeping and of dropping, in float32."""

        def layer(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, kernel_init=nn.initializers.truncated_normal(0.02), name=name)

        d = x.shape[-1]
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x.astype(jnp.float32))
        x = nn.gelu(layer(d, "token")(x), approximate=False)
        there = there[..., None]
        local, rest = x[..., : d // 2], x[..., d // 2 :]
        # Some images have nothing left in training.
        mean = (rest * there).sum(1, keepdims=True) / (there.sum(1, keepdims=True) + 1e-6)
        x = jnp.concatenate([local, jnp.broadcast_to(mean, rest.shape)], axis=-1)
        x = nn.gelu(layer(d // 2, "hidden_0")(x), approximate=False)
        x = nn.gelu(layer(d // 4, "hidden_1")(x), approximate=False)
        return nn.log_softmax(layer(2, "out")(x))


# Where the original program keeps a predictor's layers.
_LAYERS = {
    "in_conv.0": ("norm", "scale"),
    "in_conv.1": ("token", "kernel"),
    "out_conv.0": ("hidden_0", "kernel"),
    "out_conv.2": ("hidden_1", "kernel"),
    "out_conv.4": ("out", "kernel"),
}
ORIGINAL = {
    f"{name}.{part}": f"{layer}/{leaf}"
    for name, (layer, weight) in _LAYERS.items()
    for part, leaf in (("weight", weight), ("bias", "bias"))
}


def predictor_macs(n: int, d: int) -> int:
    """Multiply-adds of a predictor over n tokens, by torchprofile's convention."""
    half, quarter = d // 2, d // 4
    # The norm, the four linear maps, and the weighting before the mean.
    return n * (d + d * d + d * half + half * quarter + quarter * 2 + (d - half))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted(Importance):
    """The probability to stay, by a predictor at each stage.

    Attributes:
      ratio_weight: of the loss that holds training to the planned share of tokens.
      distill_weight: of each of the two losses against the unreduced model, if there is one.
    """

    learned: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    reads: ClassVar[str] = "tokens"

    ratio_weight: float = 2.0
    distill_weight: float = 0.5

    def check(self, title: str, stages: tuple[int, ...], shape: ViTShape) -> None:
        if shape.width < 4:
            raise InputError(f"{title} needs a width of at least 4; got {shape.width}")

    def init(self, key: Array, shape: ViTShape) -> Weights:
        tokens, there = jnp.zeros((1, 1, shape.width)), jnp.ones((1, 1))
        return Predictor(parent=None).init(key, tokens, there)["params"]

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        return import_stages(owner, arrays, "score_predictor", ORIGINAL)

    def macs(self, n: int, shape: ViTShape) -> int:
        return predictor_macs(n, shape.width)

    def _predict(self, state: TokenState, weights: Weights) -> Float[Array, "b n 2"]:
        predictor: Any = Predictor(parent=None)
        return predictor.apply({"params": weights}, state.tokens, still_there(state))

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        return jnp.exp(self._predict(state, weights)[..., 0])

    def mask(
        self, state: TokenState, context: BlockContext, weights: Weights, share: float
    ) -> TokenState:
        keep = gumbel_keep(training_key("DynamicViT", context.key), self._predict(state, weights))
        state = mask_tokens(state, keep * still_there(state))
        return recorded(state, "excess", state.valid.mean(axis=1) - share)

    def losses(
        self, title: str, info: Any, logits: Any, labels: Any, teacher: Any
    ) -> dict[str, Array]:
        losses = {}
        if "excess" in info.carry:
            losses["ratio"] = self.ratio_weight * ratio_loss(info.carry["excess"])
        if teacher is not None:
            check_answers(title, logits, labels)
            answer, features = teacher
            losses["logit_distillation"] = self.distill_weight * logit_distillation(logits, answer)
            losses["token_distillation"] = self.distill_weight * token_distillation(info, features)
        return losses


DYNAMICVIT = Composed(
    title="DynamicViT",
    schedule=Schedule(of_image=True),
    place="before",
    importance=Predicted(),
    decoupling=Decoupling(preset="importance"),
    grouping=None,
)
