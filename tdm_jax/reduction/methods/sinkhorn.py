"""Sinkhorn: tokens as soft assignments to learned centres by optimal transport.

Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCV
Workshops 2023 (arXiv 2308.04657), after Cuturi, 2013. Tokens and C learned centres lie on the unit
sphere. Their cosine over `eps` is normalised `iterations` times, over the tokens of each centre and
then over the centres of each token; with the shares P that come out, each token handing out 1 in
all, a new token is `sum_i P_ij x_i / |x_i|`: a sum of normalised tokens. (The original writes this
as a transport plan between marginals 1 / (C + n), multiplied by C + n.) It stands before blocks 3,
6 and 9 (from 0), with `floor(p * keep_rate^i)` centres.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.ops.distances import unit
from tdm_jax.reduction.contract import ViTShape
from tdm_jax.reduction.soft_clusters import Shares, SoftClusters


class Transport(nn.Module):
    """Shares of the normalised tokens in learned centres."""

    clusters: int
    eps: float
    iterations: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n m"], Float[Array, "b n d"]]:
        shape = (self.clusters, x.shape[-1])
        centres = self.param("v", nn.initializers.normal(1.0), shape)
        x = unit(x)
        scores = jnp.einsum("bnd,md->bnm", x, unit(centres), precision=jax.lax.Precision.HIGHEST)
        return sinkhorn(scores / self.eps, self.iterations), x


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByTransport(Shares):
    """Optimal transport to learned centres.

    Attributes:
      eps: entropic regularisation.
      iterations: rounds of normalisation, at least 1.
    """

    original: ClassVar[dict[str, str]] = {"v": "v"}

    eps: float = 1.0
    iterations: int = 3

    def validate(self, title: str) -> None:
        self.demand(title, "eps", self.eps > 0, "be above 0")
        self.demand(title, "iterations", self.iterations >= 1, "be at least 1")

    def module(self, clusters: int) -> nn.Module:
        return Transport(clusters, self.eps, self.iterations)

    def macs(self, n: int, m: int, shape: ViTShape) -> int:
        return shape.width * 2 * n * m


SINKHORN = SoftClusters(title="Sinkhorn", shares=ByTransport())


def sinkhorn(scores: Float[Array, "b n m"], iterations: int) -> Float[Array, "b n m"]:
    """Shares [0, 1] of each token, high where the scores are; each token hands out exactly 1.

    Every round brings the clusters to the same sum, then the tokens, in logarithms.
    """
    for _ in range(iterations):
        scores = jax.nn.log_softmax(scores, axis=1)
        scores = jax.nn.log_softmax(scores, axis=2)
    return jnp.exp(scores)
