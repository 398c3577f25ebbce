"""From checked settings to all that a training run is made of, before anything is compiled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from tdm_jax import data
from tdm_jax.checkpoint import describe, load_pretrained
from tdm_jax.data.device_transforms import mixes
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.reduction import Reducer, make_reducer
from tdm_jax.training import optim
from tdm_jax.training.config import Settings
from tdm_jax.training.keep_rate_schedule import Phase, phases
from tdm_jax.training.sparse_training import sparse
from tdm_jax.training.step import Recipe, TrainState, init_state

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to train, on what, for how long.

    Attributes:
      settings: where the rest comes from.
      recipe: the training step's, with the model as it is at the end of training.
      steps: length of the training.
      steps_per_epoch: need not be whole.
      phases: the keep rate's way, one compiled step each; their first steps ascend from 0.
      evaluated: what to evaluate, by the prefix of its metrics: "" is the model itself, then the
        further keep rates.
    """

    settings: Settings
    recipe: Recipe
    steps: int
    steps_per_epoch: float
    phases: tuple[Phase, ...]
    evaluated: dict[str, VisionTransformer]

    @property
    def model(self) -> VisionTransformer:
        """The model with the reducer that training ends with."""
        return self.recipe.model

    def phase(self, step: int) -> int:
        """Index of the phase that `step` belongs to."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= step)

    def due(self, step: int, every_epochs: float) -> bool:
        """Whether something that happens every so many epochs happens after `step`."""
        if step == self.steps or every_epochs == 0.0:
            return step == self.steps
        period = max(every_epochs * self.steps_per_epoch, 1.0)
        return math.floor(step / period) > math.floor((step - 1) / period)

    def phase_recipe(self, index: int) -> Recipe:
        """The training step's recipe during a phase."""
        model = self.model.clone(reducer=self.phases[index].reducer)
        return dataclasses.replace(self.recipe, model=model)

    def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all of them).

        Raises:
          InputError: the mesh does not cover them, or the batch does not divide over them.
        """
        mesh = sharding.make_mesh(self.settings.mesh, devices)
        sharding.check_batch(
            mesh,
            self.settings.data.batch_size,
            accumulate=self.settings.accumulate,
            pairs=mixes(self.settings.data),
            name="data.batch_size",
        )
        return mesh

    def random_state(self) -> TrainState:
        """The state before the first step, with fresh parameters: the same for every sharding."""
        return init_state(self.recipe, _init(self.model, self.settings.seed))

    def abstract_state(self) -> TrainState:
        """Shapes and types of the training state; nothing is computed."""
        return jax.eval_shape(self.random_state)


def make_experiment(
    settings: Settings,
    *,
    teacher: VisionTransformer | None = None,
    dataset: tuple[int, int] | None = None,
) -> Experiment:
    """Builds what `settings` ask for.

    Args:
      settings: from `config.parse`.
      teacher: the teacher's model, where `settings.distill` has one.
      dataset: training examples and classes; None to look at the data, which then must be there.

    Raises:
      InputError: names are unknown, the data are missing, or values do not fit together.
    """
    data_config = settings.data
    if dataset is None:
        dataset = data.num_examples(data_config, "train"), data.num_classes(data_config)
    examples, classes = dataset
    model = make_model(settings, classes)
    batch_size = data_config.batch_size
    steps_per_epoch = examples / batch_size
    steps = settings.steps or max(1, round(settings.epochs * steps_per_epoch))
    schedule = optim.learning_rate(
        settings.optim, batch_size=batch_size, steps=steps, steps_per_epoch=steps_per_epoch
    )
    recipe = Recipe(
        model=model,
        optimizer=sparse(optim.make_optimizer(settings.optim, schedule), settings.sparse, steps),
        schedule=schedule,
        data_config=data_config,
        num_classes=model.num_classes,
        seed=settings.seed,
        ema_decay=settings.optim.ema_decay,
        accumulate=settings.accumulate,
        distill=settings.distill,
        teacher=teacher,
    )
    schedule_phases = phases(settings.keep_warmup, model.reducer, steps_per_epoch=steps_per_epoch)
    evaluated = {"": model} | {
        f"keep{rate:g}/": model.clone(reducer=model.reducer.at_keep_rate(rate))
        for rate in settings.eval.keep_rates
    }
    in_phases = (model.clone(reducer=phase.reducer) for phase in schedule_phases)
    for variant in (*in_phases, *evaluated.values()):
        _check_same_weights(model, variant)
    return Experiment(settings, recipe, steps, steps_per_epoch, schedule_phases, evaluated)


def make_model(settings: Settings, classes: int) -> VisionTransformer:
    """The model, for the images and classes of its data, which it says how to prepare."""
    data_config = settings.data
    fields = dict(settings.model)
    if fields.get("name") == "init_from":
        fields |= _architecture(settings)
    if "dtype" in fields:
        fields["dtype"] = _dtype(fields["dtype"])
    if isinstance(fields.get("image_size"), int):
        fields["image_size"] = (fields["image_size"],) * 2  # as `create_model` takes it
    of_data = {
        "image_size": data_config.image_size,
        "in_channels": data_config.channels,
        "num_classes": classes,
    }
    for name, value in of_data.items():
        asked = fields.setdefault(name, value)
        if asked != value:
            raise InputError(
                f"model.{name} is {asked}, but the data ({data_config.name}) have {value}"
            )
    prepared = {f.name: getattr(data_config, f.name) for f in dataclasses.fields(Preprocessing)}
    return create_model(
        **fields, reducer=reducer_of(settings.reducer), preprocessing=Preprocessing(**prepared)
    )


def _architecture(settings: Settings) -> dict[str, Any]:
    """The transformer of `settings.init_from`, for other images, classes and methods."""
    if not settings.init_from:
        raise InputError("model.name is 'init_from', but init_from is empty")
    size = settings.data.image_size
    own = describe(load_pretrained(settings.init_from, "none", image_size=size)[0])
    given = ("image_size", "num_classes", "reducer", "preprocessing", *settings.model)
    return {key: value for key, value in own.items() if key == "name" or key not in given}


def reducer_of(settings: Mapping[str, Any]) -> Reducer:
    """The reducer of a configuration: `name` and settings, of which None is the method's own."""
    # Beside "none", settings wait for a method to be named on the command line.
    return Reducer() if settings.get("name") == "none" else make_reducer(**settings)


def initial_variables(settings: Settings, model: VisionTransformer) -> PyTree:
    """The variables of `settings.init_from`, on the host: every process has its own copy.

    Raises:
      InputError: the checkpoint is unreadable, or of another model.
    """
    loaded, variables = load_pretrained(
        settings.init_from,
        model.reducer,
        num_classes=model.num_classes,
        image_size=model.image_size,
        reset_head=settings.reset_head,
        fresh_reducer=True,
        preprocessing=model.preprocessing,
    )
    got, expected = describe(loaded), describe(model)
    # The positions have been resampled by the checkpoint's own rule.
    differences = [
        f"{key} {got.get(key)}, expected {value}"
        for key, value in expected.items()
        if got.get(key) != value and key != "interpolation"
    ]
    if differences:
        raise InputError(f"{settings.init_from} is another model: got {'; '.join(differences)}")
    return jax.tree.map(np.asarray, variables)


def load_teacher(settings: Settings) -> tuple[VisionTransformer | None, PyTree]:
    """The teacher and its variables; (None, None) without distillation.

    It is unreduced, unless the student's method says otherwise (`Reducer.of_teacher`).
    """
    path = settings.distill.teacher
    if not path:
        return None, None
    if path == "init_from":
        path = settings.init_from
    dtype = {"dtype": _dtype(settings.model["dtype"])} if "dtype" in settings.model else {}
    model, variables = load_pretrained(path, "none", image_size=settings.data.image_size, **dtype)
    model = model.clone(reducer=reducer_of(settings.reducer).of_teacher())
    return model, jax.tree.map(np.asarray, variables)


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise unknown("model.dtype", name, DTYPES)
    return DTYPES[name]


def _init(model: VisionTransformer, seed: int) -> PyTree:
    size = (1, *model.image_size, model.in_channels)
    return model.init(jax.random.key(seed), jnp.zeros(size))


def _check_same_weights(model: VisionTransformer, variant: VisionTransformer) -> None:
    shapes, others = (jax.eval_shape(lambda m=m: _init(m, 0)) for m in (model, variant))
    if shapes != others:
        raise InputError(
            f"the weights of {model.reducer.title} change shape with the keep rate; "
            "expected keep_warmup.end_epoch=0 and eval.keep_rates=()"
        )
