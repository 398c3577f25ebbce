"""TDM: token decoupling and merging (Long et al., CVPR 2023, arXiv 2211.11315).

Class attention decouples the n tokens of a stage into K attentive ones and m = n - K inattentive
ones. The inattentive are clustered by density peaks into C tokens, so that what is dropped
elsewhere stays represented; the attentive are merged to K' where they are alike; optionally EViT's
fused token is added. A cluster token is `sum(a_i z_i) / sum(a_i)` over its members, a matched one
likewise.

The merger takes any importance score, so any method that scores tokens can use it.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tdm_jax.errors import InputError, unknown
from tdm_jax.ops.distances import cosine_similarity
from tdm_jax.ops.gathering import gather_tokens, inverse_index, leading_indices, weighted_sum
from tdm_jax.ops.merging import Merge
from tdm_jax.ops.ordering import argtopk
from tdm_jax.reduction.contract import ViTShape, require
from tdm_jax.reduction.density_peaks import density_peaks, density_peaks_macs
from tdm_jax.reduction.schedules import ceil
from tdm_jax.reduction.token_state import TokenKind, TokenState


class TDMCounts(NamedTuple):
    """What one stage makes of its tokens."""

    attentive: int  # K
    matched: int  # K', what the attentive are merged to
    clusters: int  # C, what the inattentive are merged to
    fused: int  # 1 with the fused token

    @property
    def total(self) -> int:
        return self.matched + self.clusters + self.fused


class Rates(NamedTuple):
    """The shares that make the counts (see `Merger`), and whether there is a fused token."""

    attentive: float
    match: float
    cluster: float
    fuse: bool


# The settings that reproduce the authors' logged multiply-adds to the last digit.
PUBLISHED = {
    0.7: Rates(0.50, 1.00, 0.40, False),
    0.6: Rates(0.40, 0.85, 0.40, True),
    0.5: Rates(0.40, 0.90, 0.25, False),
    0.4: Rates(0.20, 0.85, 0.30, True),
    0.3: Rates(0.10, 0.70, 0.25, True),
    0.2: Rates(0.10, 0.60, 0.15, True),
}
PRESETS = ("default", "published", "importance", "diversity")
MERGES = ("match", "cluster")
WEIGHTS = ("attention", "uniform", "size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merger:
    """Decouples tokens by a score and merges both groups to fixed counts.

    Attributes:
      preset: "default" derives all rates from the keep rate; "published" has the authors' (keep
        rates 0.7, 0.6, ... 0.2); "importance" only drops the inattentive, "diversity" only clusters
        all tokens: the paper's two poles.
      attentive_rate: share of the tokens that is attentive; None for the preset's.
      match_rate: share of the attentive that their merging leaves; None for the preset's.
      cluster_rate: clusters per inattentive token; None for the preset's. If given, the count of a
        stage follows from the three rates, no longer from the keep rate.
      attentive_merge: "match" (pairs of homogeneous tokens) or "cluster" (density peaks); None for
        the preset's.
      fuse: whether to add EViT's fused token; None for the preset's. It overlaps the clusters,
        which own the patches: its size is 0.
      weight: of each token in a merge: "attention" (the score), "uniform" or "size".
      neighbors: nearest tokens that make a density; None for all, as in the authors' logs.
      proportional_attention: whether a token counts in the attention as often as it has patches, as
        in ToMe; no TDM paper has it, and networks that are used as they are keep much more by it
        (docs/backbones.md).
    """

    title: ClassVar[str] = "TDM"

    preset: str = "default"
    attentive_rate: float | None = None
    match_rate: float | None = None
    cluster_rate: float | None = None
    attentive_merge: str | None = None
    fuse: bool | None = None
    weight: str = "attention"
    neighbors: int | None = None
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        for name, known in (("preset", PRESETS), ("weight", WEIGHTS)):
            if getattr(self, name) not in known:
                raise unknown(f"TDM {name}", getattr(self, name), known)
        if self.attentive_merge not in (None, *MERGES):
            raise unknown("TDM attentive_merge", self.attentive_merge, MERGES)
        for name in ("attentive_rate", "match_rate", "cluster_rate"):
            require(self, name, 0 <= (getattr(self, name) or 0) <= 1, "be in [0, 1]")
        if self.merge == "match" and self.match_rate is not None and self.match_rate < 0.5:
            raise InputError(
                "TDM: matching merges at most every second attentive token; expected match_rate "
                f">= 0.5 or attentive_merge='cluster'; got match_rate={self.match_rate}"
            )
        require(self, "neighbors", self.neighbors is None or self.neighbors >= 1, "be at least 1")

    @property
    def merge(self) -> str:
        """How attentive tokens merge."""
        if self.attentive_merge is not None:
            return self.attentive_merge
        return "cluster" if self.preset == "published" else "match"

    @property
    def fixed(self) -> bool:
        """Whether the rates alone decide the counts, whatever else is asked for."""
        return self.preset == "published" or self.cluster_rate is not None

    def derived(self) -> "Merger":
        """The same, for any keep rate: with derived rates where the preset has a table."""
        table = self.preset == "published"
        return dataclasses.replace(self, preset="default") if table else self

    def rates(self, keep_rate: float) -> Rates:
        """The rates in force at a keep rate.

        Raises:
          InputError: the published preset has no settings for this keep rate.
        """
        if self.preset == "published":
            if keep_rate not in PUBLISHED:
                raise InputError(
                    f"TDM: preset 'published' has keep rates {', '.join(map(str, PUBLISHED))}; "
                    f"got {keep_rate}"
                )
            rates = PUBLISHED[keep_rate]
        elif self.preset == "importance":
            rates = Rates(keep_rate, 1.0, 0.0, False)
        elif self.preset == "diversity":
            rates = Rates(0.0, 1.0, keep_rate, False)
        else:
            match = 1 - (1 - keep_rate) / 4
            cluster = keep_rate / 2
            rates = Rates((keep_rate - cluster) / (match - cluster), match, cluster, False)
        own = (self.attentive_rate, self.match_rate, self.cluster_rate, self.fuse)
        return Rates._make(r if rate is None else rate for rate, r in zip(own, rates, strict=True))

    def counts(self, n: int, keep_rate: float, target: int, exact: bool = False) -> TDMCounts:
        """The counts of a stage with n tokens.

        Args:
          n: tokens that reach it.
          keep_rate: in (0, 1).
          target: how many should leave it, for presets that derive the rest from that.
          exact: whether the target includes the fused token, as a count asked for by number does,
            or leaves it out, as TDM.md has it for a keep rate.

        Raises:
          InputError: there is no way to leave so many tokens.
        """
        rates = self.rates(keep_rate)
        fused = int(rates.fuse)
        attentive = min(ceil(rates.attentive * n), n)
        inattentive = n - attentive
        if self.fixed:
            matched = ceil(rates.match * attentive)
            clusters = ceil(rates.cluster * inattentive)
            return self._possible(TDMCounts(attentive, matched, clusters, fused))
        if exact:
            target -= fused
            if target < 2:
                raise InputError(f"TDM leaves at least {2 + fused} tokens; got {target + fused}")
        target = min(max(2, target), n)
        if self.preset == "importance":
            return TDMCounts(target, target, 0, fused)
        if self.preset == "diversity":
            return TDMCounts(0, 0, target, fused)
        matched = min(ceil(rates.match * attentive), target - 1)
        clusters = min(target - matched, inattentive)
        return self._possible(TDMCounts(attentive, target - clusters, clusters, fused))

    def macs(self, n: int, keep_rate: float, counts: TDMCounts, shape: ViTShape) -> int:
        """Multiply-adds of one stage by torchprofile's convention, see `analysis.costs`."""
        d, k = shape.width, counts.attentive
        total = counts.fused * d * (n - k)
        if counts.clusters:
            total += density_peaks_macs(n - k, d)
        if self.merge == "cluster" and k and self.rates(keep_rate).match < 1:
            # The authors' program clusters even a group too small to lose a token.
            total += density_peaks_macs(k, d)
        elif self.merge == "match" and counts.matched < k:
            # Norms and weights of the tokens, and the similarities of sources and destinations.
            total += 2 * d * k + (k // 2) * (k - k // 2) * d
        return total

    def _possible(self, counts: TDMCounts) -> TDMCounts:
        pairs = counts.attentive // 2
        if self.merge == "match" and counts.attentive - counts.matched > pairs:
            raise InputError(
                f"TDM: matching can merge at most {pairs} of {counts.attentive} attentive tokens; "
                f"the rates ask for {counts.attentive - counts.matched}: expected a lower "
                "attentive_rate, a higher keep rate or attentive_merge='cluster'"
            )
        return counts

    def __call__(
        self,
        state: TokenState,
        score: Float[Array, "b n"],
        counts: TDMCounts,
        priority: Float[Array, "b n"] | None = None,
    ) -> TokenState:
        """Applies one stage: `counts.total` tokens, first the attentive, then the clusters.

        Args:
          state: the tokens.
          score: importance, which weighs the tokens in a merge.
          counts: of this stage.
          priority: who is attentive, the highest first; None for the score.
        """
        if counts.total >= state.count:
            return state
        order = argtopk(score if priority is None else priority, state.count)
        k = counts.attentive
        # Even ranks before odd ones: destinations and sources of the matching.
        order = jnp.concatenate([order[:, 0:k:2], order[:, 1:k:2], order[:, k:]], axis=1)
        attentive, rest = order[:, :k], order[:, k:]
        fixed = jax.lax.stop_gradient(state)  # who joins whom has no gradient
        groups = [self._attentive(fixed.gather(attentive), counts).of(attentive)]
        if counts.clusters:
            peaks = density_peaks(fixed.gather(rest), counts.clusters, self.neighbors)
            groups.append(peaks.of(rest))
        weight = {"attention": score, "uniform": jnp.ones_like(score), "size": state.size}
        merged = state.merge(groups, weight[self.weight])
        kept = jnp.arange(merged.count) < counts.matched
        merged = merged.replace(kind=jnp.where(kept, merged.kind, TokenKind.CLUSTER))
        if not counts.fused:
            return merged
        left_over = jnp.where(inverse_index(attentive, state.count) < 0, score, 0.0)
        return merged.append(weighted_sum(left_over[..., None], state.tokens), TokenKind.FUSED)

    def _attentive(self, tokens: Float[Array, "b k d"], counts: TDMCounts) -> Merge:
        if counts.matched == counts.attentive:
            return Merge.all(tokens)
        if self.merge == "match":
            return match(tokens, counts.matched)
        return density_peaks(tokens, counts.matched, self.neighbors)


def match(tokens: Float[Array, "b k d"], count: int) -> Merge:
    """Merges tokens in homogeneous pairs until `count` are left.

    The k - count sources that are most alike to a destination (cosine) join it.

    Args:
      tokens: the ceil(k / 2) destinations, then the sources.
      count: at least ceil(k / 2).

    Returns:
      What goes on: the destinations, then the sources that stay alone, the most alike first.
    """
    k = tokens.shape[1]
    destinations, merging = -(-k // 2), k - count
    similarity = cosine_similarity(tokens[:, destinations:], tokens[:, :destinations])
    order = argtopk(similarity.max(axis=-1), k - destinations)
    gone, stay = order[:, :merging], order[:, merging:]
    return Merge(
        keep=jnp.concatenate([leading_indices(destinations, tokens), destinations + stay], axis=1),
        gone=destinations + gone,
        into=jnp.argmax(gather_tokens(similarity, gone), axis=-1),
    )
