"""Who takes part in a comparison: a transformer, a method, a keep rate, and perhaps weights.

No method is known here by name. The baseline of a contender is the same transformer without
reduction.
"""

import ast
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import PyTree

from tdm_jax.checkpoint import load_pretrained
from tdm_jax.data import DataConfig, make_config
from tdm_jax.errors import InputError
from tdm_jax.models.registry import MODELS, create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.reduction import Reducer, StageReducer, make_reducer
from tdm_jax.training.workdir import trained_model

BASELINE = "none"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of a comparison.

    Attributes:
      name: of the transformer; contenders of one name share a baseline.
      method: as the table shows it.
      keep_rate: as the table shows it; None where there is none.
      model: with its reducer.
      params: what `model.init` returns; None for a model without weights, which has costs and a
        speed, but no accuracy.
      training: where the weights come from, if that differs within a table ("fine-tuned").
    """

    name: str
    method: str
    keep_rate: float | tuple[float, ...] | None
    model: VisionTransformer
    params: PyTree | None = None
    training: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is reduced."""
        return self.model.reducer == Reducer()

    @property
    def label(self) -> str:
        """Method, keep rate and training in a few words."""
        rates = np.atleast_1d([] if self.keep_rate is None else self.keep_rate)
        words = [self.method, "/".join(f"{rate:g}" for rate in rates), self.training]
        return " ".join(word for word in words if word)

    def unreduced(self) -> "Candidate":
        """The same transformer without its method."""
        params = self.params
        if params is not None:
            params = {"params": {k: v for k, v in params["params"].items() if k != "reducer"}}
        model = self.model.clone(reducer=Reducer())
        return Candidate(self.name, BASELINE, None, model, params)

    def weights(self) -> PyTree:
        """Its parameters, or random ones: how fast a model is does not depend on them."""
        if self.params is not None:
            return self.params
        shape = (1, *self.model.image_size, self.model.in_channels)
        return jax.jit(self.model.init)(jax.random.key(0), jnp.zeros(shape))


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and settings: `tdm/preset=published/neighbors=5`.

    Raises:
      InputError: a part is no `key=value`.
    """
    name, *parts = text.split("/")
    settings = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise InputError(f"method {text!r}: expected name/key=value/...; got {part!r}")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return name, settings


def contender(
    model: str,
    method: str = BASELINE,
    keep_rate: float | None = None,
    *,
    layers: Sequence[int] | None = None,
    loaded: dict[str, tuple[VisionTransformer, PyTree]] | None = None,
    **overrides: Any,
) -> Candidate:
    """Makes a contender from what a user names.

    Args:
      model: one of `MODELS`, which then has no weights, or a checkpoint for `load_pretrained`, or
        the working directory of a training.
      method: see `parse_method`; settings that it gives go before the arguments below.
      keep_rate: None for the method's own; a method that is given `r` or `counts` has none, nor
        has one without stages, as `none` is.
      layers: the blocks where a method with stages acts; None for its own.
      loaded: checkpoints read so far; a checkpoint is read once for all methods without weights of
        their own.
      **overrides: fields of `VisionTransformer`, for a model by name.

    Raises:
      InputError: a name, the keep rate or the checkpoint is not usable.
    """
    name, settings = parse_method(method)
    if isinstance(make_reducer(name, **settings), StageReducer):
        given = {"keep_rate": keep_rate, "layers": None if layers is None else tuple(layers)}
        if settings.keys() & {"r", "counts"}:
            del given["keep_rate"]
        settings = {key: value for key, value in given.items() if value is not None} | settings
    reducer = make_reducer(name, **settings)
    by_rate = isinstance(reducer, StageReducer) and reducer.by_rate
    shown = reducer.keep_rate if by_rate else None
    if model in MODELS:
        return Candidate(model, method, shown, create_model(model, reducer, **overrides))
    if reducer.learned:
        built, params = load_pretrained(trained_model(model), reducer, **overrides)
        return Candidate(model, method, shown, built, params)
    loaded = {} if loaded is None else loaded
    if model not in loaded:
        loaded[model] = load_pretrained(trained_model(model), **overrides)
    plain, params = loaded[model]
    return Candidate(model, method, shown, plain.clone(reducer=reducer), params)


def with_baselines(contenders: Sequence[Candidate]) -> list[Candidate]:
    """The contenders grouped by transformer, an unreduced one first in each group."""
    if not contenders:
        raise InputError("nothing to compare; expected at least one model")
    groups: dict[str, list[Candidate]] = {}
    for entry in contenders:
        groups.setdefault(entry.name, []).append(entry)
    ordered: list[Candidate] = []
    for group in groups.values():
        first = next((entry for entry in group if entry.is_baseline), group[0].unreduced())
        ordered += [first, *(entry for entry in group if entry is not first)]
    return ordered


def define_flags(models: Sequence[str] = (), methods: Sequence[str] = ()) -> None:
    """The flags that say who takes part."""
    flags.DEFINE_list("models", models, "Names of models, or checkpoints (see load_pretrained).")
    flags.DEFINE_list("methods", methods, "Methods, with settings as in tdm/preset=published.")
    flags.DEFINE_list("keep_rates", ["0.7"], "Each method runs at each of these.")
    flags.DEFINE_multi_string("entry", [], "One more row, MODEL:METHOD:KEEP_RATE; may be repeated.")
    flags.DEFINE_list("layers", None, "Blocks where methods act, from 0; default: their own.")
    flags.DEFINE_integer("num_heads", None, "Heads of a checkpoint that does not say (else of 64).")


def define_data_flags() -> None:
    """The flags that say on which data."""
    flags.DEFINE_string("data", "", "digits, folder or tfds:<name>; empty for no data.")
    flags.DEFINE_string("data_dir", "", "Root of the folder, or TFDS's data_dir.")
    flags.DEFINE_string("split", "", "Name of the validation split, where it is none of the usual.")
    flags.DEFINE_integer("eval_batch_size", 64, "Images per evaluation step.", lower_bound=1)


def from_flags(dtype: Any = jnp.float32) -> list[Candidate]:
    """Those that the flags name: every model with every method at every keep rate, and the entries.

    Args:
      dtype: of the computation.

    Raises:
      InputError: a flag's value is not usable.
    """
    given = flags.FLAGS
    rates = [number(text, float, "keep_rates") for text in given.keep_rates]
    layers = given.layers and [number(text, int, "layers") for text in given.layers]
    overrides = {"dtype": dtype}
    if given.num_heads is not None:
        overrides["num_heads"] = given.num_heads
    wanted = list(itertools.product(given.models, given.methods or [BASELINE], rates))
    for text in given.entry:
        parts = text.rsplit(":", 2)
        if len(parts) != 3:
            raise InputError(f"--entry: expected MODEL:METHOD:KEEP_RATE; got {text!r}")
        wanted.append((*parts[:2], number(parts[2], float, "entry")))
    loaded: dict[str, tuple[VisionTransformer, PyTree]] = {}
    found: dict[tuple[str, str, Any], Candidate] = {}
    for model, method, rate in wanted:
        one = contender(model, method, rate, layers=layers, loaded=loaded, **overrides)
        # What has no keep rate is there once, however many were asked for.
        found.setdefault((one.name, one.method, one.keep_rate), one)
    if not found:
        raise InputError("no model given; expected --models or --entry")
    return list(found.values())


def data_from_flags(model: VisionTransformer) -> DataConfig | None:
    """The data that the flags name, as the model wants its images; None if they name none."""
    given = flags.FLAGS
    if not given.data:
        return None
    wanted = {
        "name": given.data,
        "data_dir": given.data_dir,
        "validation_split": given.split,
        "image_size": model.image_size,
        "channels": model.in_channels,
        "eval_batch_size": given.eval_batch_size,
    }
    check_channels(model, given.data)
    return make_config({key: value for key, value in wanted.items() if value})


def check_channels(model: VisionTransformer, data: str) -> None:
    """Refuses data whose images have other channels than the model takes."""
    channels = 1 if data == "digits" else 3
    if model.in_channels != channels:
        raise InputError(
            f"--data={data}: expected images of {model.in_channels} channels, as the model takes "
            f"them; got {channels}"
        )


def number(text: str, kind: type[int] | type[float], flag: str) -> int | float:
    """A number from a flag's text."""
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--{flag}: expected a number; got {text!r}") from error
