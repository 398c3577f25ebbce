"""A search of the space of methods for the point that keeps most of a network, at one cost.

Nothing is trained and no labels are needed: what is asked is how true each point stays to the
unreduced model (`fidelity`), at the same multiply-adds.

1. Every point of a stated grid (`GRID`), and what is known to be good (`KNOWN`), is brought to the
   budget by its schedule, and successive halving (Jamieson & Talwalkar, AISTATS 2016) compares
   them: all on a few images, the best third on three times as many, until few are left on all.
2. The winner is refined, one setting after the other (`REFINED`).
3. Its schedule is searched by itself. What a block loses when it alone removes some share
   of its tokens is measured; a dynamic program picks, for the sum of these losses, how many tokens
   each block should leave within the budget. The result takes the place of the winner's schedule
   where it loses less on all images.
4. The best are measured once more, on images that no choice has seen.

Every measurement is kept, so a search that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdm_jax.analysis import costs
from tdm_jax.analysis.budget import at_budget, check_budget
from tdm_jax.analysis.candidate import BASELINE, Candidate, described, method_text
from tdm_jax.analysis.fidelity import Fidelity, Photographs
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.timing import Timing, compile_forward, measure
from tdm_jax.checkpoint.integrity import checksums
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, make_reducer
from tdm_jax.reduction.axes import AXES
from tdm_jax.reduction.schedules import Schedule

# Each axis with the values that are tried.
GRID: dict[str, tuple[Any, ...]] = {
    "layers": ("from_sixth", "all", "quarters"),
    "protected": (0.3, 0.0, 0.6),
    "grouping": ("bipartite", "density_peaks"),
    "metric": ("tokens", "keys"),
    "average": ("size", "attention"),
    "proportional_attention": (True,),
}
# Points that are known to be good take part with those of the grid.
KNOWN: tuple[Mapping[str, Any], ...] = ({"preset": "frozen"},)
# Settings of the winner that are tried one after the other; the best value of each is kept.
REFINED: dict[str, tuple[Any, ...]] = {
    "size_power": (0.5, 1.0),
    "one_sided": (0.5,),
    "average": ("size_attention",),
    "score_weight": (0.5,),
    "score_power": (0.2, 0.5),
    "protected": (0.15, 0.45),
}
# Where the winner is moved to, one axis at a time, for an ablation.
MOVES: dict[str, tuple[Any, ...]] = {
    "importance": ("class", "mean", "value", "key_norm", "shift", "chance"),
    "protected": (0.0, 0.15, 0.3, 0.45, 0.6),
    "grouping": ("bipartite", "density_peaks", "energy"),
    "size_power": (0.0, 0.5, 1.0),
    "score_power": (0.0, 0.2, 0.5),
    "one_sided": (0.0, 0.5),
    "metric": ("tokens", "unit_tokens", "keys", "head_keys", "inputs"),
    "average": ("size", "uniform", "attention", "size_attention", "centre", "norm"),
    "proportional_attention": (True, False),
}
# What is known from the literature, at the same cost.
PUBLISHED = ("tdm", "tome", "evit", "random")
# Shares of the images on which all points, a third of them and so on are compared.
HALVING = 3
FINALISTS = 4
# Shares of a block's tokens that are removed to see what it loses.
PROBED = (0.08, 0.25, 0.5)
_LEVELS = 64

Point = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A point brought to the budget.

    Attributes:
      name: of the method.
      settings: for `make_reducer`.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any]) -> "Trial":
        """With settings in order."""
        return cls(name, tuple(sorted(settings.items())))

    @property
    def reducer(self) -> Reducer:
        """The method with these settings."""
        return make_reducer(self.name, **dict(self.settings))

    @property
    def description(self) -> str:
        """As every command takes it: `tdm/protected=0.3/...`."""
        return method_text(self.name, dict(self.settings))

    def moved(self, **settings: Any) -> "Trial":
        """The same with some settings changed; a part that goes takes its own with it."""
        kept = dict(self.settings)
        if "counts" in settings:
            for other in ("keep_rate", "r", "ratio"):
                kept.pop(other, None)
        for axis in AXES.keys() & settings.keys():
            for field in dataclasses.fields(getattr(self.reducer, axis)):
                kept.pop(field.name, None)
        return Trial.of(self.name, {**kept, **settings})


class Measurements:
    """Fidelity of trials on images, each measured once and kept in a folder."""

    def __init__(
        self, candidate: Candidate, photographs: Photographs, digest: str, folder: Path | None
    ) -> None:
        """Of one model on some images.

        Args:
          candidate: whose model.
          photographs: the images.
          digest: of what the images are.
          folder: where measurements are kept; None for nowhere.
        """
        self._candidate, self._photographs, self._folder = candidate, photographs, folder
        weights = sorted(checksums(candidate.variables).items())
        self._whole = f"{digest}\n{candidate.unreduced().model!r}\n{weights}"

    def __len__(self) -> int:
        return len(self._photographs)

    def __call__(self, trial: Trial, count: int) -> Fidelity:
        """On the first `count` images."""
        count = min(count, len(self))
        if self._folder is None:
            return self._measure(trial, count)
        named = f"{self._whole}\n{trial.description}\n{count}"
        path = self._folder / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
        if path.exists():
            return _read(path)
        found = self._measure(trial, count)
        values = {k: None if v is None else v.tolist() for k, v in found._asdict().items()}
        write_text(path, json.dumps({"method": trial.description, **values}) + "\n")
        return found

    def _measure(self, trial: Trial, count: int) -> Fidelity:
        return self._photographs(self._candidate.with_reducer(trial.reducer), count)


def _read(path: Path) -> Fidelity:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = [values[name] for name in Fidelity._fields]
        arrays: Any = (None if value is None else np.asarray(value) for value in kept)
        return Fidelity(*arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: {error}; expected a measurement (without the file, it is redone)"
        ) from error


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Attributes:
      candidate: whose model, with weights.
      chosen: measures on the images that choices are made by.
      unseen: on those that no choice sees.
      macs: multiply-adds that one image may cost.
      dense_weight: what the dense features' loss counts beside that of the pooled one.
      note: is told what is being done.
    """

    candidate: Candidate
    chosen: Measurements
    unseen: Measurements
    macs: int
    dense_weight: float = 0.25
    note: Callable[[str], None] = lambda text: None

    @property
    def model(self) -> VisionTransformer:
        """The candidate's."""
        return self.candidate.model

    def __call__(self, grid: Mapping[str, Sequence[Any]] | None = None) -> list[Result]:
        """The finalists, the best first, then published methods, and the unreduced model.

        Raises:
          InputError: the budget is no reduction, or cannot be met.
        """
        check_budget(self.model, self.macs)
        known = [self.point(point) for point in KNOWN]
        trials = [trial for trial in known if trial is not None]
        trials += self.trials(GRID if grid is None else grid)
        if not trials:
            raise InputError(f"no point of the space costs at most {self.macs / 1e9:.4g} G")
        best = self.halving(trials)
        for further in (self.refined, self.schedule):
            trial = further(best[0])
            if trial is not None and self.loss(trial) < self.loss(best[0]):
                best = [trial, *best]
        rows = [self.row(trial) for trial in best[:FINALISTS]]
        for name in PUBLISHED:
            known = self.within(name, {})
            rows += [self.row(known)] if known is not None else []
        unreduced = dataclasses.replace(self.row(Trial(BASELINE, ())), description=None)
        return [*rows, unreduced]

    def ablation(self, trial: Trial) -> list[Result]:
        """The trial, and what it becomes when it is moved along one axis, with the same counts."""
        rows = [self.row(trial)]
        for axis, values in MOVES.items():
            for value in values:
                moved = trial.moved(**{axis: value})
                try:
                    moved.reducer.check(self.model.shape)
                    if moved.reducer == trial.reducer:
                        continue
                    row = self.row(moved)
                except InputError as error:
                    self.note(f"search: left out {axis}={value}: {error}")
                    continue
                rows.append(dataclasses.replace(row, description=f"{axis}={value}"))
        return rows

    def loss(self, trial: Trial, count: int | None = None) -> float:
        """What a trial loses on the images that choices are made by."""
        return self.chosen(trial, count or len(self.chosen)).loss(self.dense_weight)

    def row(self, trial: Trial) -> Result:
        """A trial on the images that no choice has seen."""
        own = self.candidate.with_reducer(trial.reducer)
        found: dict[str, Any] = self.unseen(trial, len(self.unseen)).columns()
        return Result(
            model=self.candidate.name,
            method=trial.name,
            description=trial.description,
            macs=costs.multiply_adds(own.model),
            examples=len(self.unseen),
            **found,
        )

    def trials(self, grid: Mapping[str, Sequence[Any]]) -> Iterator[Trial]:
        """Every point of a grid that fits the model, at the budget."""
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            if (trial := self.point(point)) is not None:
                yield trial

    def point(self, point: Point) -> Trial | None:
        """A point of the grid at the budget; None where it does not fit."""
        return self.within("tdm", point)

    def within(self, name: str, settings: Mapping[str, Any]) -> Trial | None:
        """A method with these settings at the highest cost that the budget allows, if at any."""
        try:
            reducer = at_budget(self.model, make_reducer(name, **settings), self.macs)
        except InputError:
            return None
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in described(reducer).items()}
        return Trial.of(name, {**settings, **found})

    def halving(self, trials: Sequence[Trial]) -> list[Trial]:
        """The best trials, the best first."""
        total, count, left = len(self.chosen), len(self.chosen), list(trials)
        rungs = max(0, int(np.ceil(np.log(len(left) / FINALISTS) / np.log(HALVING))))
        count = max(8, total // HALVING**rungs)
        while True:
            losses = {}
            for index, trial in enumerate(left):
                losses[trial] = self.loss(trial, count)
                self.note(
                    f"search: {count} images, {index + 1} of {len(left)}, "
                    f"lost {losses[trial]:.5f}: {trial.description}"
                )
            left.sort(key=lambda trial: losses[trial])
            if count >= total:
                return left
            left = left[: max(FINALISTS, -(-len(left) // HALVING))]
            count = min(total, count * HALVING)

    def refined(self, trial: Trial) -> Trial | None:
        """A trial with the best values of further settings, found one after the other."""
        count = max(8, len(self.chosen) // HALVING)
        least = self.loss(trial, count)
        for setting, values in REFINED.items():
            for value in values:
                moved = trial.moved(**{setting: value})
                try:
                    lost = self.loss(moved, count)
                except InputError:  # a setting of another part
                    continue
                self.note(f"search: {setting}={value} loses {lost:.5f}, without it {least:.5f}")
                if lost < least:
                    trial, least = moved, lost
        return trial

    def schedule(self, trial: Trial) -> Trial | None:
        """A trial with the counts that its blocks' own losses ask for; None without blocks."""
        layers = Schedule(layers=dict(trial.settings)["layers"]).stages(self.model.shape)
        lost = self.sensitivities(trial, layers)
        counts = allocate(self.model, trial, layers, lost, self.macs)
        return None if counts is None else trial.moved(counts=counts)

    def sensitivities(
        self, trial: Trial, layers: tuple[int, ...]
    ) -> dict[int, tuple[tuple[float, float], ...]]:
        """What each block loses when it alone removes some shares of all tokens."""
        patches, found = self.model.shape.patches, {}
        count = max(8, len(self.chosen) // HALVING)
        for layer in layers:
            each = [(0.0, 0.0)]
            for share in PROBED:
                left = patches - max(1, int(share * patches * 0.9))
                alone = trial.moved(layers=(layer,), counts=(left,))
                try:
                    each.append(((patches - left) / patches, self.loss(alone, count)))
                except InputError:  # more than a grouping can remove
                    continue
            self.note(f"search: block {layer} alone loses {[f'{v:.5f}' for _, v in each[1:]]}")
            found[layer] = tuple(each)
        return found


def macs_of_latency(candidate: Candidate, ratio: float, timing: Timing, batch_size: int) -> int:
    """The multiply-adds that a share of the unreduced model's time on this device buys.

    Points at one cost differ little in time, so one stands for all: the frozen preset of TDM is
    measured in turns with the unreduced model, at shares of its cost that are halved in between.

    Args:
      candidate: whose model.
      ratio: of the time, in (0, 1).
      timing: how long to measure.
      batch_size: images per call.

    Raises:
      InputError: the preset is not as fast at any cost.
    """
    plain = candidate.unreduced()
    whole = costs.multiply_adds(plain.model)
    unreduced = compile_forward(plain.model, plain.any_variables(), batch_size)
    frozen = make_reducer("tdm", preset="frozen")
    low, high = 0.2, 1.0
    found = 0
    for _ in range(5):
        middle = (low + high) / 2
        fast = False
        try:
            reducer = at_budget(candidate.model, frozen, int(middle * whole))
        except InputError:
            pass
        else:
            own = candidate.with_reducer(reducer)
            program = compile_forward(own.model, own.any_variables(), batch_size)
            _, measured = measure([unreduced, program], timing)
            fast = 1 / measured.speedup.median <= ratio
            found = costs.multiply_adds(own.model) if fast else found
        low, high = (middle, high) if fast else (low, middle)
    if not found:
        raise InputError(
            f"TDM's frozen preset takes more than {ratio:g} of the unreduced model's time here, "
            "whatever it costs; expected a larger share"
        )
    return found


def allocate(
    model: VisionTransformer,
    trial: Trial,
    layers: tuple[int, ...],
    lost: Mapping[int, Sequence[tuple[float, float]]],
    macs: int,
) -> tuple[int, ...] | None:
    """How many tokens each stage should leave, by dynamic programming.

    Minimises the sum over stages of what a block loses by the share that it removes (`lost`, pairs
    of share and loss, linear between them), on a grid of counts, under the budget; of the price of
    a multiply-add the smallest that meets it is found by bisection.

    Args:
      model: whose costs count.
      trial: the method.
      layers: its stages.
      lost: by block.
      macs: the budget.

    Returns:
      Counts, or None where none meets the budget.
    """
    shape = model.shape
    step = max(1, shape.patches // _LEVELS)
    levels = np.arange(shape.patches, 0, -step)
    price_of = _block_costs(model, levels)

    def counts_at(price: float) -> tuple[int, ...]:
        # value[i]: least loss and price of what is left from a stage on that is reached with
        # levels[i] tokens.
        value, choices = np.zeros(len(levels)), []
        ends = [*layers[1:], shape.depth]
        for layer, end in reversed(list(zip(layers, ends, strict=True))):
            share = 1 - levels[None, :] / levels[:, None]
            shares, losses = np.asarray(lost[layer]).T
            own = np.interp(share, shares, losses)
            own = np.where((share < 0) | (share > shares.max()), np.inf, own)
            total = own + price * (end - layer) * price_of[None, :] + value[None, :]
            choices.append(total.argmin(axis=1))
            value = total.min(axis=1)
        place, counts = 0, []
        for choice in reversed(choices):
            place = choice[place]
            counts.append(int(levels[place]))
        return tuple(counts)

    def fits(price: float) -> tuple[int, ...] | None:
        counts = counts_at(price)
        try:
            reducer = trial.moved(counts=counts).reducer
            reducer.check(shape)
            return counts if costs.multiply_adds(model.clone(reducer=reducer)) <= macs else None
        except InputError:
            return None

    low, high = 0.0, 1e-6
    while fits(high) is None:
        high *= 4
        if high > 1e6:
            return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) is not None else (middle, high)
    return fits(high)


def _block_costs(model: VisionTransformer, levels: np.ndarray) -> np.ndarray:
    """Multiply-adds of a block, in G, with so many patch tokens."""
    d, hidden, prefix = model.width, model.mlp_hidden, model.shape.prefix
    t = levels + prefix
    gates = 3 if model.gated_mlp else 2
    return (t * (4 * d * d + gates * d * hidden) + 2 * t * t * d) / 1e9
