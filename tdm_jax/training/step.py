"""One step of training and of evaluation: pure functions of their arguments, no I/O.

Everything random in a step comes from `fold_in(key(seed), step)`, so a step can be repeated from
its state and batch alone, on any number of devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Float, PyTree

from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import augment_batch, normalise
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.platform import reverse_mode, split_over
from tdm_jax.parallel.sharding import (
    batch_sharding,
    gather_params,
    replicated,
    scatter_grads,
    state_shardings,
)
from tdm_jax.training import losses, metrics

Metrics = dict[str, Float[Array, ""]]


@struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: number of updates so far, int32 [].
      variables: what `model.init` returns, in float32.
      opt_state: the optimiser's moments and count.
      ema: exponential moving average of `variables`; {} if the recipe keeps none.
    """

    step: PyTree
    variables: PyTree
    opt_state: PyTree
    ema: PyTree


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a training step is compiled for.

    Attributes:
      model: the student, with its reducer.
      optimizer: turns gradients into updates.
      schedule: the optimiser's learning rate, for the metrics.
      data_config: what augmentation and normalisation need to know.
      num_classes: width of the targets.
      seed: root of all randomness.
      ema_decay: decay of the averaged weights; 0 keeps none.
      accumulate: parts that the batch is split into, one after another, to save memory. Without
        drop path or a stochastic reducer the update is that of the whole batch.
      distill: how a teacher takes part.
      teacher: the teacher's model; None without distillation.
    """

    model: VisionTransformer
    optimizer: optax.GradientTransformation
    schedule: Callable
    data_config: DataConfig
    num_classes: int
    seed: int = 0
    ema_decay: float = 0.0
    accumulate: int = 1
    distill: losses.DistillConfig = losses.NO_DISTILLATION
    teacher: VisionTransformer | None = None


def init_state(recipe: Recipe, variables: PyTree) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=recipe.optimizer.init(variables),
        # A copy: a step donates its state, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, variables) if recipe.ema_decay > 0.0 else {},
    )


def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: Mapping[str, Array],
    teacher_variables: PyTree = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """Augments a batch, and follows the gradient of its mean loss.

    Args:
      recipe: static; close over it before `jax.jit`.
      state: the state; may be donated.
      batch: `image` uint8 [b, h, w, c] and `label` int32 [b].
      teacher_variables: the teacher's parameters, if the recipe has one.
      mesh: that the state is split over; None for one device.

    Returns:
      The next state, and `loss`, its parts, `grad_norm` and `learning_rate` of this step.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    augment_key, model_key = jax.random.split(key)
    images, targets = augment_batch(
        augment_key, batch["image"], batch["label"], recipe.data_config, recipe.num_classes
    )

    variables = state.variables
    if mesh is not None:
        variables, teacher_variables = gather_params(mesh, (variables, teacher_variables))

    def gradient(key: Array, images: Array, targets: Array) -> tuple[PyTree, Metrics]:
        grads, values = jax.grad(_loss, has_aux=True)(
            variables, recipe, teacher_variables, key, images, targets
        )
        return grads if mesh is None else scatter_grads(mesh, grads), values

    if recipe.accumulate > 1:
        gradient = _accumulated(gradient, variables, recipe.accumulate)
    with reverse_mode():
        grads, values = gradient(model_key, images, targets)

    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.variables)
    variables = optax.apply_updates(state.variables, updates)
    ema = state.ema
    if recipe.ema_decay > 0.0:
        ema = optax.incremental_update(variables, state.ema, 1.0 - recipe.ema_decay)
    values |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(recipe.schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, variables, opt_state, ema), values


def eval_step(
    model: VisionTransformer,
    variables: PyTree,
    batch: Mapping[str, Array],
    data_config: DataConfig,
) -> Metrics:
    """Sums over the examples of a batch whose `mask` is set: count, top1, top5, loss."""
    images = normalise(batch["image"], data_config.mean, data_config.std)
    logits: Any = model.apply(variables, images)
    return metrics.sums(logits, batch["label"], batch["mask"] > 0)


def lower_train_step(
    recipe: Recipe, mesh: Mesh, state: TrainState, teacher_variables: PyTree = None
) -> Lowered:
    """The training step over a mesh, ready to compile; `state` (shapes suffice) is donated."""
    shardings = state_shardings(mesh, state)
    teacher = state_shardings(mesh, teacher_variables)
    step = jax.jit(
        functools.partial(train_step, recipe, mesh=mesh),
        in_shardings=(shardings, batch_sharding(mesh), teacher),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    batch = _abstract_batch(recipe.data_config, recipe.data_config.batch_size)
    with split_over(mesh):
        return step.lower(state, batch, teacher_variables)


def lower_eval_step(
    model: VisionTransformer,
    data_config: DataConfig,
    batch_size: int,
    mesh: Mesh,
    variables: PyTree,
) -> Lowered:
    """The evaluation step over a mesh, ready to compile; of `variables` shapes suffice."""
    step = jax.jit(
        lambda variables, batch: eval_step(
            model, gather_params(mesh, variables), batch, data_config
        ),
        in_shardings=(state_shardings(mesh, variables), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    batch = _abstract_batch(data_config, batch_size)
    batch["mask"] = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    with split_over(mesh):
        return step.lower(variables, batch)


def _abstract_batch(data_config: DataConfig, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (size, *data_config.image_size, data_config.channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def _loss(
    variables: PyTree,
    recipe: Recipe,
    teacher_variables: PyTree,
    key: Array,
    images: Float[Array, "b h w c"],
    targets: Float[Array, "b k"],
) -> tuple[Float[Array, ""], Metrics]:
    dropout, chance = jax.random.split(key)
    reducer = recipe.model.reducer

    def answer(model: VisionTransformer, variables: PyTree, **options: Any) -> Any:
        # Without `Info`, which only a method's losses read, the last block costs less.
        output = model.apply(variables, images, return_info=reducer.has_losses, **options)
        return output if reducer.has_losses else (output, None)

    rngs = {"dropout": dropout, "reducer": chance}
    output, info = answer(recipe.model, variables, train=True, rngs=rngs)
    # A distilled model answers twice in training; without its token both terms see one answer.
    logits, distilled = output if isinstance(output, tuple) else (output, output)
    values = {"cross_entropy": losses.cross_entropy(logits, targets).mean()}
    total = values["cross_entropy"]
    teacher = None
    if recipe.teacher is not None:
        teacher = answer(recipe.teacher, teacher_variables, rngs={"reducer": chance})
        term = losses.distillation(distilled, teacher[0], recipe.distill).mean()
        values["distillation"] = term
        total = (1.0 - recipe.distill.weight) * total + recipe.distill.weight * term
    auxiliary = reducer.losses(info, logits, targets, teacher) if reducer.has_losses else {}
    total = total + sum(auxiliary.values())
    return total, values | auxiliary | {"loss": total}


def _accumulated(gradient: Callable, variables: PyTree, parts: int) -> Callable:
    """`gradient` over `parts` equal parts of the batch, one after another, averaged."""

    def split(x: Array) -> Array:
        # Part i takes rows i, i + parts, ...: each device keeps the rows that it holds.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def one(total: PyTree, part: tuple) -> tuple[PyTree, Metrics]:
        grads, values = gradient(*part)
        return jax.tree.map(jnp.add, total, grads), values

    def averaged(key: Array, images: Array, targets: Array) -> tuple[PyTree, Metrics]:
        inputs = jax.random.split(key, parts), split(images), split(targets)
        total, values = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, variables), inputs)
        return jax.tree.map(lambda g: g / parts, total), {k: v.mean() for k, v in values.items()}

    return averaged
