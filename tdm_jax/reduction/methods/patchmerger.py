"""PatchMerger: Learning to Merge Tokens in Vision Transformers.

Renggli et al., 2022 (arXiv 2202.12015).
`softmax_tokens(W LN(x)^T) LN(x)` (equation 1): each of C learned queries takes a weighted mean of
the normed tokens; the logits are not scaled. The paper has one merger in the middle of the
network; here, as in the token reduction benchmarks, one stands before blocks 3, 6 and 9 (from 0),
with `floor(p * keep_rate^i)` queries.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.reduction.contract import ViTShape
from tdm_jax.reduction.soft_clusters import Shares, SoftClusters


class Queries(nn.Module):
    """Attention of learned queries over the normed tokens."""

    clusters: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n m"], Float[Array, "b n d"]]:
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        shape = (self.clusters, x.shape[-1])
        queries = self.param("queries", nn.initializers.normal(1.0), shape)
        logits = jnp.einsum("bnd,md->bnm", x, queries, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.softmax(logits, axis=1), x


class ByQueries(Shares):
    """Attention of learned queries."""

    original: ClassVar[dict[str, str]] = {
        "queries": "queries",
        "norm.weight": "norm/scale",
        "norm.bias": "norm/bias",
    }

    def module(self, clusters: int) -> nn.Module:
        return Queries(clusters)

    def macs(self, n: int, m: int, shape: ViTShape) -> int:
        return shape.width * (n + 2 * n * m)


PATCHMERGER = SoftClusters(title="PatchMerger", shares=ByQueries())
