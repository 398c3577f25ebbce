"""Who is attentive and who is not, and how many tokens each group leaves.

TDM (Long et al., CVPR 2023, arXiv 2211.11315) decouples the n tokens of a stage into K attentive
ones and m = n - K inattentive ones. The inattentive are grouped into C tokens, so that what is
dropped elsewhere stays represented; the attentive are merged to K' where they are alike; optionally
EViT's fused token is added. Its two poles are other methods' whole: to keep the attentive and drop
the rest, and to group all tokens.
"""

import dataclasses
from typing import NamedTuple

from tdm_jax.errors import InputError, unknown
from tdm_jax.reduction.parts import Part
from tdm_jax.reduction.schedules import ceil


class Counts(NamedTuple):
    """What one stage makes of its tokens."""

    attentive: int  # K
    matched: int  # K', what the attentive are merged to
    clusters: int  # C, what the inattentive are merged to
    fused: int  # 1 with the fused token

    @property
    def total(self) -> int:
        """Tokens that leave the stage."""
        return self.matched + self.clusters + self.fused


class Rates(NamedTuple):
    """The shares that make the counts (see `Decoupling`), and whether there is a fused token."""

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
PRESETS = ("default", "published", "importance", "diversity", "frozen")
MERGES = ("match", "cluster")
# Share of what a stage leaves that a preset keeps as it is, where it says so.
PROTECTED = {"importance": 1.0, "diversity": 0.0, "frozen": 0.15}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoupling(Part):
    """How a stage splits its tokens, and into how many each group merges.

    Attributes:
      preset: "default" derives all rates from the keep rate; "published" has the authors' (keep
        rates 0.7, 0.6, ... 0.2); "importance" only drops the inattentive, "diversity" only groups
        all tokens: the paper's two poles; "frozen" lies between them (`methods.tdm`).
      protected: share of what a stage leaves that are attentive tokens, kept as they are, while the
        others make up the rest: 1 for the importance pole, 0 for the diversity pole, 0.15 for the
        frozen preset. None for the preset's; of the default and published ones the rates decide.
      attentive_rate: share of the tokens that is attentive; None for the preset's.
      match_rate: share of the attentive that their merging leaves; None for the preset's.
      cluster_rate: clusters per inattentive token; None for the preset's. If given, the count of a
        stage follows from the three rates, no longer from the keep rate.
      attentive_merge: "match" (pairs of homogeneous tokens) or "cluster" (the grouping of the
        others); None for the preset's.
      fuse: whether to add EViT's fused token; None for the preset's. Beside clusters, which own the
        patches, its size is 0; alone it owns what it was made of.
    """

    preset: str = "default"
    protected: float | None = None
    attentive_rate: float | None = None
    match_rate: float | None = None
    cluster_rate: float | None = None
    attentive_merge: str | None = None
    fuse: bool | None = None

    def validate(self, title: str) -> None:
        if self.preset not in PRESETS:
            raise unknown(f"{title} preset", self.preset, PRESETS)
        if self.attentive_merge not in (None, *MERGES):
            raise unknown(f"{title} attentive_merge", self.attentive_merge, MERGES)
        for name in ("protected", "attentive_rate", "match_rate", "cluster_rate"):
            self.demand(title, name, 0 <= (getattr(self, name) or 0) <= 1, "be in [0, 1]")
        rates = [n for n in ("attentive_rate", "match_rate", "cluster_rate") if getattr(self, n)]
        if self.share is not None and rates:
            raise InputError(
                f"{title}: a share that is protected decides the counts (preset "
                f"{self.preset!r}, protected={self.share:g}); expected {' and '.join(rates)} with "
                "preset='default'"
            )
        if self.merge == "match" and self.match_rate is not None and self.match_rate < 0.5:
            raise InputError(
                f"{title}: matching merges at most every second attentive token; expected "
                "match_rate >= 0.5 or attentive_merge='cluster'; got "
                f"match_rate={self.match_rate}"
            )

    @property
    def share(self) -> float | None:
        """The share that is protected; None where rates decide."""
        return PROTECTED.get(self.preset) if self.protected is None else self.protected

    @property
    def drops(self) -> bool:
        """Whether inattentive tokens are left out, but for a fused token."""
        return self.share == 1

    @property
    def groups_all(self) -> bool:
        """Whether no token is attentive."""
        return self.share == 0

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

    def derived(self) -> "Decoupling":
        """The same, for any keep rate: with derived rates where the preset has a table."""
        table = self.preset == "published"
        return dataclasses.replace(self, preset="default") if table else self

    def rates(self, title: str, keep_rate: float) -> Rates:
        """The rates in force at a keep rate.

        Raises:
          InputError: the published preset has no settings for this keep rate.
        """
        if self.share is not None:
            kept = self.share * keep_rate
            rates = Rates(kept, 1.0, (keep_rate - kept) / max(1 - kept, 1e-9), False)
        elif self.preset == "published":
            if keep_rate not in PUBLISHED:
                raise InputError(
                    f"{title}: preset 'published' has keep rates {', '.join(map(str, PUBLISHED))}; "
                    f"got {keep_rate}"
                )
            rates = PUBLISHED[keep_rate]
        else:
            match = 1 - (1 - keep_rate) / 4
            cluster = keep_rate / 2
            rates = Rates((keep_rate - cluster) / (match - cluster), match, cluster, False)
        own = (self.attentive_rate, self.match_rate, self.cluster_rate, self.fuse)
        return Rates._make(r if rate is None else rate for rate, r in zip(own, rates, strict=True))

    def counts(self, title: str, n: int, keep_rate: float, target: int, exact: bool) -> Counts:
        """The counts of a stage with n tokens.

        Args:
          title: of the method, for errors.
          n: tokens that reach it.
          keep_rate: in (0, 1).
          target: how many should leave it, for presets that derive the rest from that.
          exact: whether the target includes the fused token, as a count asked for by number does,
            or leaves it out, as TDM.md has it for a keep rate.

        Raises:
          InputError: there is no way to leave so many tokens.
        """
        rates = self.rates(title, keep_rate)
        fused = int(rates.fuse)
        attentive = min(ceil(rates.attentive * n), n)
        inattentive = n - attentive
        if self.fixed:
            matched = ceil(rates.match * attentive)
            clusters = ceil(rates.cluster * inattentive)
            return self._possible(title, Counts(attentive, matched, clusters, fused))
        least = 2 if self.share is None else 1
        if exact:
            target -= fused
            if target < least:
                last = ", the last of them fused" if fused else ""
                raise InputError(
                    f"{title} leaves at least {least + fused} tokens{last}; got {target + fused}"
                )
        target = min(max(least, target), n)
        if self.share is not None:
            kept = target if self.drops else min(ceil(self.share * target), target - 1)
            return Counts(kept, kept, target - kept, fused)
        matched = min(ceil(rates.match * attentive), target - 1)
        clusters = min(target - matched, inattentive)
        return self._possible(title, Counts(attentive, target - clusters, clusters, fused))

    def _possible(self, title: str, counts: Counts) -> Counts:
        pairs = counts.attentive // 2
        if self.merge == "match" and counts.attentive - counts.matched > pairs:
            raise InputError(
                f"{title}: matching can merge at most {pairs} of {counts.attentive} attentive "
                f"tokens; the rates ask for {counts.attentive - counts.matched}: expected a lower "
                "attentive_rate, a higher keep rate or attentive_merge='cluster'"
            )
        return counts
