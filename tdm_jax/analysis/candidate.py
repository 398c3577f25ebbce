"""Who takes part in a comparison: a transformer, a method, a keep rate, and perhaps weights.

No method is known here by name. The baseline of a candidate is the same transformer without
reduction.
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tdm_jax.analysis.budget import at_budget
from tdm_jax.analysis.costs import multiply_adds
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.errors import InputError
from tdm_jax.models.registry import MODELS, create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, StageReducer, describe_reducer, make_reducer

BASELINE = "none"
CHANCE = "random"  # the method that others must beat
KeepRate = float | tuple[float, ...] | None
# What was read so far, by checkpoint and method: it is read once for all methods without weights.
Loaded = dict[tuple[str, Reducer | None], tuple[VisionTransformer, PyTree]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a comparison.

    Attributes:
      name: of the transformer; candidates of one name share a baseline.
      method: as the table shows it.
      keep_rate: as the table shows it; None where there is none.
      model: with its reducer.
      variables: what `model.init` returns; None for a model without weights, which has costs and a
        speed, but no accuracy.
      training: where the weights come from, if that differs within a table ("fine-tuned").
      budget: multiply-adds in G that its setting was solved for; None where it was given.
    """

    name: str
    method: str
    keep_rate: KeepRate
    model: VisionTransformer
    variables: PyTree | None = None
    training: str = ""
    budget: float | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is reduced."""
        return self.model.reducer == Reducer()

    @property
    def label(self) -> str:
        """Method, keep rate and training in a few words."""
        rates = np.atleast_1d([] if self.keep_rate is None else self.keep_rate)
        level = "/".join(f"{rate:g}" for rate in rates)
        level = level if self.budget is None else f"{self.budget:.4g}G"
        return " ".join(word for word in (self.method, level, self.training) if word)

    @property
    def level(self) -> Any:
        """What candidates of one cost share: the budget, or else the keep rate."""
        return self.keep_rate if self.budget is None else self.budget

    @property
    def row(self) -> dict[str, Any]:
        """What a `Result` says of who it is."""
        own = {"method": self.method, "keep_rate": self.keep_rate, "training": self.training}
        if self.budget is not None:
            settings = {**parse_method(self.method)[1], **described(self.model.reducer)}
            own["description"] = method_text(self.method.partition("/")[0], settings)
        return {"model": self.name, **own}

    def with_reducer(self, reducer: Reducer) -> "Candidate":
        """The same transformer with a method of no weights, or with fresh ones."""
        variables = None
        if self.variables is not None and not reducer.learned:
            kept = {k: v for k, v in self.variables["params"].items() if k != "reducer"}
            variables = {"params": kept}
        model = self.model.clone(reducer=reducer)
        return dataclasses.replace(self, model=model, variables=variables)

    def unreduced(self) -> "Candidate":
        """The same transformer without its method."""
        plain = self.with_reducer(Reducer())
        return dataclasses.replace(plain, method=BASELINE, keep_rate=None, training="", budget=None)

    def at_budget(self, macs: int) -> "Candidate":
        """The same method at the highest cost that a budget allows; the unreduced model as it is.

        Raises:
          InputError: see `budget.at_budget`.
        """
        if self.is_baseline:
            return self
        reducer = at_budget(self.model, self.model.reducer, macs)
        solved = dataclasses.replace(self, model=self.model.clone(reducer=reducer))
        return dataclasses.replace(solved, keep_rate=_rate(reducer), budget=macs / 1e9)

    def any_variables(self) -> PyTree:
        """Its variables, or random ones: how fast a model is does not depend on them."""
        if self.variables is not None:
            return self.variables
        shape = (1, *self.model.image_size, self.model.in_channels)
        return jax.jit(self.model.init)(jax.random.key(0), jnp.zeros(shape))


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and settings: `tdm/preset=published/neighbors=5`, `tome/layers=3-6-9`.

    Raises:
      InputError: a part is no `key=value`.
    """
    name, *parts = text.split("/")
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise InputError(f"method {text!r}: expected name/key=value/...; got {part!r}")
        if re.fullmatch(r"\d+(-\d+)+", value):
            settings[key] = tuple(map(int, value.split("-")))
            continue
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return name, settings


def method_text(name: str, settings: Mapping[str, Any]) -> str:
    """What `parse_method` reads; numbers of a list are joined by `-`, for commas split flags."""

    def text(value: Any) -> str:
        return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return "/".join([name, *(f"{key}={text(value)}" for key, value in settings.items())])


def described(reducer: Reducer) -> dict[str, Any]:
    """A method's settings, as far as they are not its defaults."""
    return {k: v for k, v in describe_reducer(reducer).items() if k != "name"}


def make_candidate(
    model: str,
    method: str | None = BASELINE,
    keep_rate: KeepRate = None,
    *,
    layers: Sequence[int] | None = None,
    run_layers: Sequence[int] | None = None,
    loaded: Loaded | None = None,
    **settings: Any,
) -> Candidate:
    """Makes a candidate from what a user names.

    Args:
      model: one of `MODELS`, which then has no weights, or a checkpoint for `load_pretrained`.
      method: see `parse_method`; settings in it go before the arguments below. None for the method
        that a checkpoint was saved with.
      keep_rate: None for the method's own; a method with `r` or `counts` has none, nor has one
        without stages, as `none` is.
      layers: the blocks where a method with stages acts; None for its own.
      run_layers: those of a training, for methods that act at a few blocks and are told none.
      loaded: checkpoints read so far.
      **settings: of `load_pretrained`, or fields of `VisionTransformer` for a model by name.

    Raises:
      InputError: a name, the keep rate or the checkpoint is not usable.
    """
    reducer = None if method is None else _reducer(method, keep_rate, layers, run_layers)
    if model in MODELS:
        built, variables = create_model(model, reducer or Reducer(), **settings), None
    else:
        loaded = {} if loaded is None else loaded
        # A reducer without weights of its own is put into a model that was read without one.
        read = reducer if reducer is None or reducer.learned else Reducer()
        if (model, read) not in loaded:
            loaded[model, read] = load_pretrained(model, read, **settings)
        built, variables = loaded[model, read]
    if reducer is None:
        reducer = built.reducer
        if keep_rate is not None:
            reducer = reducer.at_keep_rate(keep_rate)
        if layers is not None and isinstance(reducer, StageReducer):
            reducer = reducer.scheduled(dataclasses.replace(reducer.schedule, layers=tuple(layers)))
        method = describe_reducer(reducer)["name"]
    rate = _rate(reducer)
    return Candidate(model, str(method), rate, built.clone(reducer=reducer), variables)


def _rate(reducer: Reducer) -> KeepRate:
    if isinstance(reducer, StageReducer) and (reducer.by_rate or reducer.adaptive):
        return reducer.schedule.keep_rate
    return None


def _reducer(
    method: str,
    keep_rate: KeepRate,
    layers: Sequence[int] | None,
    run_layers: Sequence[int] | None,
) -> Reducer:
    name, settings = parse_method(method)
    reducer = make_reducer(name, **settings)
    if not isinstance(reducer, StageReducer):
        return reducer
    if layers is None and reducer.schedule.layers != "all":
        layers = run_layers
    shared = {"keep_rate": keep_rate, "layers": layers}
    if settings.keys() & {"r", "counts"}:
        del shared["keep_rate"]
    return make_reducer(name, **{**shared, **settings})


def make_candidates(
    models: Sequence[str] = (),
    methods: Sequence[str | None] = (BASELINE,),
    keep_rates: Sequence[KeepRate] = (None,),
    candidates: Sequence[tuple[str, str, float]] = (),
    gmacs: Sequence[float] = (),
    macs_ratios: Sequence[float] = (),
    **settings: Any,
) -> list[Candidate]:
    """Every model with every method at every keep rate, and more candidates, each one once.

    Args:
      models: see `make_candidate`.
      methods: of all models.
      keep_rates: of all methods; what has no keep rate is there once, however many there are.
      candidates: further ones, as (model, method, keep rate).
      gmacs: budgets of multiply-adds, in G, instead of the keep rates.
      macs_ratios: more of them, as shares of what each model takes without reduction.
      **settings: see `make_candidate`.

    Raises:
      InputError: there are none, or one cannot be made.
    """
    loaded: Loaded = {}
    made: dict[Any, Candidate] = {}
    solved = bool(gmacs or macs_ratios)
    rates = [None] if solved else keep_rates
    for model, method, keep_rate in (*itertools.product(models, methods, rates), *candidates):
        candidate = make_candidate(model, method, keep_rate, loaded=loaded, **settings)
        each = [candidate]
        if solved and keep_rate is None:
            whole = multiply_adds(candidate.unreduced().model)
            budgets = [int(g * 1e9) for g in gmacs] + [int(share * whole) for share in macs_ratios]
            each = [candidate.at_budget(macs) for macs in budgets]
        for one in each:
            made.setdefault((one.name, one.method, one.level), one)
    if not made:
        raise InputError("no model given; expected --models or --candidate")
    return list(made.values())


def with_baselines(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates grouped by transformer, an unreduced one first in each group."""
    if not candidates:
        raise InputError("nothing to compare; expected at least one model")
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.name, []).append(candidate)
    ordered: list[Candidate] = []
    for group in groups.values():
        first = next((one for one in group if one.is_baseline), group[0].unreduced())
        ordered += [first, *(one for one in group if one is not first)]
    return ordered


def check_weights(candidates: Sequence[Candidate]) -> None:
    """Raises InputError if a candidate has no weights."""
    for candidate in candidates:
        if candidate.variables is None:
            raise InputError(
                f"{candidate.name} is a name without weights; expected a checkpoint to evaluate"
            )
