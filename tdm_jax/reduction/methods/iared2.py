"""IA-RED2: redundancy reduction by policies (Pan et al., NeurIPS 2021, arXiv 2106.12620).

The blocks fall into groups, and before each (blocks 0, 4 and 8 of 12) a multi-head interpreter
judges every patch token x against the class token p:

    I(x) = 1/H sum_h sigmoid(<q_h(x), k_h(p)> / sqrt(d/H))

with q and k linear maps of the tokens, normalised to mean 0 and variance 1.

In training each token that is still there stays with probability I(x), drawn anew, and masked
tokens are hidden. The interpreters learn by REINFORCE with the reward

    R = 1 - (mean over groups of the kept share)^2 if the answer is right, else -penalty

and the loss `-(R - baseline) * mean over groups of the mean log-probability of the draws`. They see
detached tokens, so that only this loss moves them, and this loss moves only them. At inference
stage s keeps the `floor(patches * keep_rate^(s+1))` highest I, ordered by it.

Settled here, as the authors released no program: the normalised tokens and the scale inside the
sigmoid, which would else be saturated in deep blocks; sums of log-probabilities are means, so that
the loss does not grow with the image; the baseline is the batch's mean reward instead of the reward
of a second, greedy pass; all groups and the backbone learn together instead of in turns; draws
follow `0.8 I + 0.2 (1 - I)`, so that a policy that is sure of itself still explores.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.importance import Importance
from tdm_jax.reduction.learned import (
    check_answers,
    mask_tokens,
    recorded,
    still_there,
    training_key,
)
from tdm_jax.reduction.original_weights import import_stages
from tdm_jax.reduction.parts import Scores, linear
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpreted(Importance):
    """How informative a policy, rewarded for right and cheap answers, finds a token.

    Attributes:
      penalty: what a wrong answer costs.
      exploration: share of the probability that is turned over when drawing, in [0, 0.5).
      policy_weight: of the policy's loss.
    """

    needs: ClassVar[str] = "a class token"
    learned: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    reads: ClassVar[str] = "tokens"

    penalty: float = 0.5
    exploration: float = 0.2
    policy_weight: float = 1.0

    def fits(self, shape: ViTShape) -> bool:
        return shape.class_token

    def validate(self, title: str) -> None:
        self.demand(title, "exploration", 0 <= self.exploration < 0.5, "be in [0, 0.5)")

    def init(self, key: Array, shape: ViTShape) -> Weights:
        # Wide enough for the judgements of fresh interpreters to differ.
        token, judge = jax.random.split(key)
        d = shape.width
        return {"token": linear(token, d, d), "class": linear(judge, d, d)}

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        names = {
            f"{part}.{name}": f"{part}/{leaf}"
            for part in ("token", "class")
            for name, leaf in (("weight", "kernel"), ("bias", "bias"))
        }
        return import_stages(owner, arrays, "interpreter", names)

    def macs(self, n: int, shape: ViTShape) -> int:
        d = shape.width
        # Two linear maps, the products, and the mean over heads.
        return (n + 1) * d * d + n * d + n

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        heads = context.shape.num_heads

        def project(x: Array, part: str) -> Array:
            x = jax.lax.stop_gradient(x).astype(jnp.float32)
            x = jax.nn.standardize(x, epsilon=1e-6)
            x = x @ weights[part]["kernel"] + weights[part]["bias"]
            return x.reshape(*x.shape[:2], heads, -1)

        q, k = project(state.tokens, "token"), project(state.prefix[:, :1], "class")
        informative = jnp.einsum("bnhk,bmhk->bnhm", q, k)[..., 0] * q.shape[-1] ** -0.5
        return jax.nn.sigmoid(informative).mean(axis=-1)

    def mask(
        self, state: TokenState, context: BlockContext, weights: Weights, share: float
    ) -> TokenState:
        # The reward, not the schedule, says how many stay in training.
        there, score = still_there(state), self.measure(state, context, weights)
        probability = score + self.exploration * (1 - 2 * score)
        stays = jax.random.bernoulli(training_key("IARED2", context.key), probability)
        drawn = jnp.log(jnp.where(stays, probability, 1 - probability))
        drawn = (drawn * there).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)
        state = mask_tokens(state, stays * there)
        state = recorded(state, "kept", state.valid.mean(axis=1))
        return recorded(state, "log_probability", drawn)

    def losses(
        self, title: str, info: Any, logits: Any, labels: Any, teacher: Any
    ) -> dict[str, Array]:
        if "kept" not in info.carry:
            return {}
        check_answers(title, logits, labels)
        right = jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1)
        reward = rewards(right, info.carry["kept"], self.penalty)
        return {"policy": self.policy_weight * policy_loss(reward, info.carry["log_probability"])}


IARED2 = Composed(
    title="IARED2",
    schedule=Schedule(layers="thirds", of_image=True),
    place="before",
    importance=Interpreted(),
    decoupling=Decoupling(preset="importance"),
    grouping=None,
)


def rewards(
    right: Bool[Array, " b"], kept: Float[Array, "b s"], penalty: float
) -> Float[Array, " b"]:
    """`1 - (mean kept share)^2` for a right answer, `-penalty` for a wrong one."""
    return jnp.where(right, 1 - kept.mean(axis=1) ** 2, -penalty)


def policy_loss(
    reward: Float[Array, " b"], log_probability: Float[Array, "b s"]
) -> Float[Array, ""]:
    """REINFORCE: `-mean_b((R - mean R) log p)`. No gradient flows through the rewards."""
    advantage = jax.lax.stop_gradient(reward - reward.mean())
    return -(advantage * log_probability.mean(axis=1)).mean()
