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
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape, Weights, require
from tdm_jax.reduction.learned import training_key
from tdm_jax.reduction.original_weights import stage_name
from tdm_jax.reduction.prune import PruneReducer
from tdm_jax.reduction.stages import Layers
from tdm_jax.reduction.token_state import TokenState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SViTE(PruneReducer):
    """Keeps the patches that one learned linear map scores highest.

    Attributes:
      temperature: of the Gumbel-softmax in training.
    """

    learned: ClassVar[bool] = True
    before: ClassVar[bool] = True

    layers: Layers = (0,)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "temperature", self.temperature > 0, "be positive")

    def init(self, key: Array, shape: ViTShape) -> Weights:
        draw = jax.nn.initializers.truncated_normal(0.02)
        return {
            stage_name(stage): {"kernel": draw(key, (shape.width, 1)), "bias": jnp.zeros((1,))}
            for stage, key in enumerate(jax.random.split(key, len(self.stages(shape))))
        }

    def import_weights(self, arrays: dict[str, np.ndarray]) -> Weights:
        if set(arrays) != {"gumbel.weight", "gumbel.bias"}:
            raise InputError(
                "SViTE: expected the weights gumbel.weight and gumbel.bias; "
                f"got {', '.join(sorted(arrays)) or 'none'}"
            )
        if self.layers == "all" or len(self.layers) != 1:
            raise InputError(
                "SViTE: the original's weights are of 1 stage; expected layers with one block; "
                f"got {self.layers}"
            )
        only = {"kernel": arrays["gumbel.weight"].T, "bias": arrays["gumbel.bias"]}
        return {stage_name(0): only}

    def score_macs(self, n: int, shape: ViTShape) -> int:
        return n * shape.width

    def score(self, state: TokenState, context: BlockContext) -> Float[Array, "b n"]:
        own = context.weights[stage_name(self.stage(context))]
        score = state.tokens.astype(jnp.float32) @ own["kernel"] + own["bias"]
        score = jax.nn.log_softmax(score[..., 0])
        if context.train:
            noise = jax.random.gumbel(training_key(self, context), score.shape)
            score = (score + noise) / self.temperature
        return jax.nn.softmax(score)

    def reduce(self, state: TokenState, context: BlockContext) -> TokenState:
        if not context.train or self.merger is not None:
            return super().reduce(state, context)
        score = self.score(state, context)
        index = argtopk(score, self.stage_count(self.stage(context), state.count, context.shape))
        soft = gather_tokens(score, index)
        one = 1 + (soft - jax.lax.stop_gradient(soft))
        state = state.select(index)
        return state.replace(tokens=state.tokens * one[..., None].astype(state.tokens.dtype))
