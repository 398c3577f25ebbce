"""SViTE+'s token selector (Chen et al., NeurIPS 2021, arXiv 2106.04533, section 3.3).

At the input, after the position embedding, one linear map scores each patch, and the k highest
scores go on: `k = ceil(keep_rate * n)`. Training perturbs the log-softmax of the scores with Gumbel
noise and takes the top k of that (a sample without replacement); the kept tokens are multiplied by
a 1 whose gradient is that of the softmax, straight through.

Settled here: the original multiplies dropped tokens by 0 and carries them along, and lets the class
token compete before it is put back; ours drops them, in training too, and prefix tokens never
compete. The method's other half, sparse weights, is in `tdm_jax.training.sparse_training`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tdm_jax.errors import InputError
from tdm_jax.reduction.composed import Composed
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights
from tdm_jax.reduction.decoupling import Decoupling
from tdm_jax.reduction.importance import Importance
from tdm_jax.reduction.learned import training_key
from tdm_jax.reduction.original_weights import stage_name
from tdm_jax.reduction.parts import Scores
from tdm_jax.reduction.schedules import Schedule
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScore(Importance):
    """The softmax of a linear map of the tokens.

    Attributes:
      temperature: of the Gumbel-softmax in training.
    """

    learned: ClassVar[bool] = True
    straight_through: ClassVar[bool] = True
    reads: ClassVar[str] = "tokens"

    temperature: float = 1.0

    def validate(self, title: str) -> None:
        self.demand(title, "temperature", self.temperature > 0, "be positive")

    def init(self, key: Array, shape: ViTShape) -> Weights:
        kernel = jax.nn.initializers.truncated_normal(0.02)(key, (shape.width, 1))
        return {"kernel": kernel, "bias": jnp.zeros((1,))}

    def import_weights(self, owner: Any, arrays: dict[str, np.ndarray]) -> Weights:
        if set(arrays) != {"gumbel.weight", "gumbel.bias"}:
            raise InputError(
                f"{owner.title}: expected the weights gumbel.weight and gumbel.bias; "
                f"got {', '.join(sorted(arrays)) or 'none'}"
            )
        if owner.schedule.number != 1:
            raise InputError(
                f"{owner.title}: the original's weights are of 1 stage; expected layers with one "
                f"block; got {owner.schedule.layers}"
            )
        only = {"kernel": arrays["gumbel.weight"].T, "bias": arrays["gumbel.bias"]}
        return {stage_name(0): only}

    def macs(self, n: int, shape: ViTShape) -> int:
        return n * shape.width

    def measure(self, state: TokenState, context: BlockContext, weights: Weights) -> Scores:
        score = state.tokens.astype(jnp.float32) @ weights["kernel"] + weights["bias"]
        score = jax.nn.log_softmax(score[..., 0])
        if context.train:
            noise = jax.random.gumbel(training_key("SViTE", context.key), score.shape)
            score = (score + noise) / self.temperature
        return jax.nn.softmax(score)


SVITE = Composed(
    title="SViTE",
    schedule=Schedule(layers=(0,)),
    place="before",
    importance=LinearScore(),
    decoupling=Decoupling(preset="importance"),
    grouping=None,
)
