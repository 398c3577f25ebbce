"""SiT: Self-slimmed Vision Transformer (Zong et al., ECCV 2022, arXiv 2111.12624).

The token slimming module: `softmax_tokens(s * W2 gelu(W1 LN(x)))^T x` (equation 3), with W1 halving
the width, one row of W2 for each of the C new tokens, and a learned scale s. It stands before
blocks 3, 6 and 9 (from 0), with `floor(p * keep_rate^i)` rows.
"""

from typing import ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from tdm_jax.reduction.contract import ViTShape
from tdm_jax.reduction.soft_clusters import Shares, SoftClusters


class Slimming(nn.Module):
    """Shares of the tokens by a small MLP."""

    clusters: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n m"], Float[Array, "b n d"]]:
        y = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        y = nn.gelu(nn.Dense(x.shape[-1] // 2, name="fc1")(y), approximate=False)
        y = nn.Dense(self.clusters, name="fc2")(y)
        scale = self.param("scale", nn.initializers.ones, (1, 1, 1))
        return jax.nn.softmax(y * scale, axis=1), x


class ByMlp(Shares):
    """Shares by a learned MLP."""

    original: ClassVar[dict[str, str]] = {
        "scale": "scale",
        "weight.0.weight": "norm/scale",
        "weight.0.bias": "norm/bias",
        "weight.1.weight": "fc1/kernel",
        "weight.1.bias": "fc1/bias",
        "weight.3.weight": "fc2/kernel",
        "weight.3.bias": "fc2/bias",
    }

    def module(self, clusters: int) -> nn.Module:
        return Slimming(clusters)

    def macs(self, n: int, m: int, shape: ViTShape) -> int:
        d = shape.width
        # Norm, two linear maps, the scale, and the sums.
        return n * (d + d * (d // 2) + (d // 2) * m + m + m * d)


SIT = SoftClusters(title="SiT", shares=ByMlp())
