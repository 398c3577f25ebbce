"""The training loop, from a configuration to trained weights in a working directory."""

import contextlib
import math
import sys
from os import PathLike
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from tdm_jax import data
from tdm_jax.checkpoint import Store
from tdm_jax.checkpoint.workdir import CHECKPOINTS
from tdm_jax.errors import InputError
from tdm_jax.parallel import sharding
from tdm_jax.parallel.preemption import Preemption
from tdm_jax.training.compiled_steps import CompiledSteps
from tdm_jax.training.config import parse
from tdm_jax.training.evaluator import RunEvaluator
from tdm_jax.training.experiment import Experiment, load_teacher, make_experiment
from tdm_jax.training.metric_writer import Progress
from tdm_jax.training.profiler import Profiler
from tdm_jax.training.saving import first_state, restore, save_models, to_disk
from tdm_jax.training.step import Metrics
from tdm_jax.training.workdir import (
    check_same_run,
    open_workdir,
    read_result,
    write_result,
    write_start,
)


class DivergedError(InputError):
    """The loss or the gradient is no longer finite."""


def train_and_evaluate(config: ConfigDict, workdir: str | PathLike[str]) -> dict[str, float]:
    """Trains to the end, or continues from the last checkpoint in `workdir`.

    Args:
      config: see `config.Settings`.
      workdir: a folder or gs://...; made if it does not exist; what is in it belongs to one run. A
        run that was finished there is not repeated.

    Returns:
      The last evaluation (`top1`, `top5` in percent, `loss`, ...) and `step`, the number of steps
      done: fewer than asked for if the run was told to stop.

    Raises:
      InputError: the configuration cannot be, or `workdir` holds a run of another one.
      DivergedError: the loss is no longer finite; the last good checkpoint stays.
    """
    settings = parse(config)
    workdir = open_workdir(workdir, settings)
    check_same_run(workdir, settings)
    teacher, teacher_variables = load_teacher(settings)
    experiment = make_experiment(settings, teacher=teacher)
    mesh = experiment.make_mesh()
    result = read_result(workdir)
    if result is not None:
        return result
    keep = settings.checkpoint
    store = Store(workdir / CHECKPOINTS, keep_last=keep.keep_last, keep_best=keep.keep_best)
    with contextlib.closing(store):
        return _train(experiment, mesh, workdir, store, teacher_variables)


def train_to_end(config: ConfigDict, workdir: str | PathLike[str]) -> dict[str, float]:
    """`train_and_evaluate` for programs that go on with what was trained.

    Raises:
      SystemExit: the run was told to stop, and with it the program.
    """
    result = train_and_evaluate(config, workdir)
    if read_result(epath.Path(workdir)) is None:
        sys.exit(f"stopped at step {result['step']} of {workdir}; the same command continues")
    return result


def _train(
    experiment: Experiment, mesh: Mesh, workdir: epath.Path, store: Store, teacher_variables: PyTree
) -> dict[str, float]:
    """All steps that are left, the last evaluation, and the trained models."""
    settings, steps = experiment.settings, experiment.steps
    shardings = sharding.state_shardings(mesh, teacher_variables)
    teacher_variables = jax.device_put(teacher_variables, shardings)
    state = restore(store, experiment, mesh) or first_state(experiment, mesh)
    start, loss, result = int(state.step), None, {}
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    with contextlib.ExitStack() as stack:

        def opened(piece: Any) -> Any:
            return stack.enter_context(contextlib.closing(piece))

        progress = opened(
            Progress(
                workdir,
                start=start,
                steps=steps,
                batch_size=settings.data.batch_size,
                tensorboard=settings.tensorboard,
            )
        )
        write_start(workdir, settings, experiment.model)
        compiled = opened(CompiledSteps(experiment, mesh, teacher_variables))
        profiler = opened(Profiler(workdir / "profile", settings.profile_steps))
        batches = opened(data.train_batches(settings.data, start_step=start, **place))
        evaluate = RunEvaluator(experiment, mesh)
        preemption = stack.enter_context(Preemption())
        for step in range(start + 1, steps + 1):
            update, phase = compiled.at(step - 1)
            progress.begin(step, phase)
            profiler.before(step)
            batch = sharding.place_batch(mesh, next(batches))
            state, values = update(state, batch, teacher_variables)
            # At most one step in flight beside this one: the host must not run away.
            jax.block_until_ready(loss)
            loss = values["loss"]
            progress.advance()

            stop = preemption.requested(step)
            evaluates = experiment.due(step, settings.eval.every_epochs)
            saves = stop or experiment.due(step, settings.checkpoint.every_epochs)
            if step % settings.log_every == 0 or evaluates or saves:
                progress.train(step, _finite(step, values, store, workdir), phase.keep_rate)
            result = evaluate(state) if evaluates else {}
            if evaluates:
                progress.evaluation(step, result)
            if saves:
                store.save(step, to_disk(state), metrics=result or None)
            if evaluates or saves:
                progress.flush(step)
            if stop:
                progress.note(f"stopped at step {step}; the same command continues")
                return {**result, "step": step}
        if start == steps:
            result = evaluate(state)
            progress.evaluation(steps, result)
    store.wait()
    save_models(workdir, experiment, mesh, state)
    result = {**result, "step": steps}
    write_result(workdir, result)
    return result


def _finite(step: int, values: Metrics, store: Store, workdir: epath.Path) -> dict[str, float]:
    """The values of a step on the host, if training may go on from them."""
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        store.wait()
        good = store.latest_step()
        where = "none" if good is None else str(workdir / CHECKPOINTS / str(good))
        raise DivergedError(
            f"loss {values['loss']} with gradient norm {values['grad_norm']} at step {step}, "
            f"expected finite numbers; last good checkpoint: {where}"
        )
    return values
