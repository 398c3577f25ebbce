"""Which tokens are grouped: every grouping turns vectors into a `Merge` of a fixed count."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float

from tdm_jax.errors import unknown
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import BlockContext, ViTShape
from tdm_jax.reduction.density_peaks import density_peaks
from tdm_jax.reduction.linkage import LINKAGES, clusters, cosine_distance
from tdm_jax.reduction.matching import (
    by_cost,
    by_edge,
    by_rank,
    by_similarity,
    energy,
    matching_macs,
)
from tdm_jax.reduction.medoids import medoids
from tdm_jax.reduction.parts import Part


class Members(NamedTuple):
    """The tokens to be grouped: all of a stage, or those that are on one side.

    Attributes:
      metric: their vectors; the most important first, or in the order in which they stand.
      score: importance; 1 where the method has none.
      size: how many patches each stands for.
      context: of the stage.
      prefix: tokens in front of them.
    """

    metric: Float[Array, "b n k"]
    score: Float[Array, "b n"]
    size: Float[Array, "b n"]
    context: BlockContext
    prefix: int = 0


class Grouping(Part):
    """Groups tokens."""

    # Whether a group stands for what it is made of as a cluster, alone or not.
    makes_clusters: ClassVar[bool] = False
    # Whether what it costs counts prefix tokens.
    with_prefix: ClassVar[bool] = False
    # Whether it weighs tokens by their importance.
    by_score: ClassVar[bool] = False

    # Whether it goes by the order in which tokens stand.
    by_place: ClassVar[bool] = False

    def fewest(self, n: int) -> int:
        """Groups that n tokens can be merged to at the least."""
        return 1

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        """Multiply-adds of grouping n tokens by vectors of a width."""
        raise NotImplementedError

    def mean_macs(self, n: int, shape: ViTShape) -> int:
        """Multiply-adds of the groups' means."""
        return (n + shape.prefix * self.with_prefix) * shape.width

    def merge(self, members: Members, count: int) -> Merge:
        """Groups tokens into `count` groups."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityPeaks(Grouping):
    """Clusters about the peaks of density, see `density_peaks`.

    Attributes:
      neighbors: nearest tokens that make a density, itself included; None for all.
    """

    makes_clusters: ClassVar[bool] = True

    neighbors: int | None = None

    def validate(self, title: str) -> None:
        given = self.neighbors
        self.demand(title, "neighbors", given is None or given >= 1, "be at least 1")

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        # As the authors' logs have it: the statistics of the distances.
        return 3 * n + 2 * n * n + 7

    def merge(self, members: Members, count: int) -> Merge:
        return density_peaks(members.metric, count, self.neighbors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bipartite(Grouping):
    """Every second token, by place, may join the most alike of those between (ToMe).

    By similarity alone; or, with one of the settings below, where least is lost (`by_cost`).

    Attributes:
      size_power: how much large tokens are left alone; at 1 it is Ward's criterion for unit
        vectors.
      score_power: how much important tokens are left alone.
      one_sided: how much more it costs to join a token that another would join for less.
    """

    with_prefix: ClassVar[bool] = True
    by_place: ClassVar[bool] = True

    size_power: float = 0.0
    score_power: float = 0.0
    one_sided: float = 0.0

    def validate(self, title: str) -> None:
        for name in ("size_power", "score_power", "one_sided"):
            self.demand(title, name, getattr(self, name) >= 0, "be at least 0")

    @property
    def by_score(self) -> bool:  # type: ignore[override]
        """Whether the score weighs in."""
        return self.score_power > 0

    def fewest(self, n: int) -> int:
        return n - n // 2

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        return matching_macs(n + shape.prefix, width)

    def merge(self, members: Members, count: int) -> Merge:
        merging = members.metric.shape[1] - count
        powers = (self.size_power, self.score_power)
        if not (any(powers) or self.one_sided):
            return by_similarity(members.metric, members.prefix, merging)
        penalties = zip((members.size, members.score), powers, strict=True)
        used = [(weight, power) for weight, power in penalties if power]
        return by_cost(members.metric, members.prefix, merging, used, self.one_sided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyMatching(Grouping):
    """Matches tokens by rank of energy (PiToMe, equation 4); see `methods.pitome`.

    Attributes:
      margin: of the energy in the first block; it falls linearly to 0 behind the last.
    """

    margin: float = 0.75

    def fewest(self, n: int) -> int:
        return n - n // 2

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        # The similarities, and the energies.
        return n * n * width + n

    def merge(self, members: Members, count: int) -> Merge:
        metric, layer = members.metric, members.context.layer
        depth, n = members.context.shape.depth, metric.shape[1]
        similarity = cosine_similarity(metric, metric)
        margin = self.margin - self.margin * layer / depth
        rank = argtopk(energy(similarity, margin), n)
        pairs = by_edge if layer < math.ceil(depth / 2) else by_rank
        return pairs(similarity, rank, n - count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agglomeration(Grouping):
    """The two closest clusters become one until few enough are left (ATC).

    Attributes:
      linkage: how far apart two clusters are, one of `linkage.LINKAGES`.
    """

    linkage: str = "average"

    def validate(self, title: str) -> None:
        if self.linkage not in LINKAGES:
            raise unknown(f"{title} linkage", self.linkage, LINKAGES)

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        return n * n * width  # the similarities

    def merge(self, members: Members, count: int) -> Merge:
        return clusters(cosine_distance(members.metric), count, self.linkage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medoids(Grouping):
    """Each token joins the nearest medoid, weighted by importance (K-Medoids).

    Attributes:
      iterations: updates of the centres.
    """

    makes_clusters: ClassVar[bool] = True
    by_score: ClassVar[bool] = True

    iterations: int = 3

    def validate(self, title: str) -> None:
        self.demand(title, "iterations", self.iterations >= 0, "be at least 0")

    def macs(self, n: int, width: int, shape: ViTShape) -> int:
        # Distances count nothing; the weights times the sums of distances do, in every round.
        return self.iterations * n

    def merge(self, members: Members, count: int) -> Merge:
        return medoids(members.metric, members.score, count, self.iterations)


GROUPINGS: dict[str, Grouping] = {
    "density_peaks": DensityPeaks(),
    "bipartite": Bipartite(),
    "energy": EnergyMatching(),
    "agglomeration": Agglomeration(),
    "medoids": Medoids(),
}
