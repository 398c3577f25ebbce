"""Trains a model: `python -m tdm_jax.train --config=configs/digits.py --workdir=...`.

The same command continues an interrupted run, on any number of devices. The working directory holds
`config.json`, `metrics.jsonl`, `checkpoints/`, and at the end `model/` (what `load_pretrained`
reads) and `result.json`.
"""

import contextlib
import functools
import json
import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any

import jax
from absl import flags
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from tdm_jax import data
from tdm_jax.checkpoint import Store, describe, save_model
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.errors import InputError
from tdm_jax.parallel import distributed, sharding
from tdm_jax.parallel.preemption import Preemption
from tdm_jax.training.config import parse
from tdm_jax.training.evaluator import Evaluator
from tdm_jax.training.experiment import Experiment, initial_params, load_teacher, make_experiment
from tdm_jax.training.metric_writer import Progress
from tdm_jax.training.step import Metrics, TrainState, init_state, lower_train_step
from tdm_jax.training.workdir import (
    CHECKPOINTS,
    MODEL,
    MODEL_EMA,
    check_same_run,
    open_workdir,
    read_result,
    write_config,
    write_result,
)


class DivergedError(InputError):
    """The loss or the gradient is no longer finite."""


def train_and_evaluate(config: ConfigDict, workdir: str | PathLike[str]) -> dict[str, float]:
    """Trains to the end, or continues from the last checkpoint in `workdir`.

    Args:
      config: see `settings.Settings`.
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
    check_same_run(workdir, config)
    teacher, teacher_params = load_teacher(settings)
    experiment = make_experiment(settings, teacher=teacher)
    mesh = experiment.make_mesh()
    result = read_result(workdir)
    if result is not None:
        return result
    keep = settings.checkpoint
    store = Store(workdir / CHECKPOINTS, keep_last=keep.keep_last, keep_best=keep.keep_best)
    with contextlib.closing(store):
        run = _Run(experiment, mesh, workdir, store, teacher_params)
        write_config(workdir, config)
        with contextlib.closing(run):
            return run.train()


def train_to_end(config: ConfigDict, workdir: str | PathLike[str]) -> dict[str, float]:
    """`train_and_evaluate` for programs that go on with what was trained.

    Raises:
      SystemExit: the run was told to stop, and with it the program.
    """
    result = train_and_evaluate(config, workdir)
    if read_result(epath.Path(workdir)) is None:
        sys.exit(f"stopped at step {result['step']} of {workdir}; the same command continues")
    return result


class _Run:
    """One training with its files."""

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        workdir: epath.Path,
        store: Store,
        teacher_params: PyTree,
    ) -> None:
        self.experiment, self.mesh, self.workdir, self.store = experiment, mesh, workdir, store
        abstract = experiment.abstract_state()
        self.shardings = sharding.state_shardings(mesh, abstract)
        self.abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.shardings,
        )
        self.teacher_params = jax.device_put(
            teacher_params, sharding.state_shardings(mesh, teacher_params)
        )
        self.state = self._restored() or self._fresh()
        self.profiling = False
        self.update, self.previous = None, None
        self.start = int(self.state.step)
        self.progress = Progress(
            workdir,
            start=self.start,
            steps=experiment.steps,
            batch_size=experiment.data.batch_size,
            tensorboard=experiment.settings.tensorboard,
            silent=jax.process_index() > 0,
        )
        self.compiled = _CompiledSteps(experiment, mesh, self.abstract, self.teacher_params)
        self.evaluators: dict[str, Evaluator] = {}

    def train(self) -> dict[str, float]:
        """All steps that are left, and the last evaluation."""
        steps = self.experiment.steps
        result: dict[str, float] = {}
        with Preemption() as preemption, contextlib.closing(self._batches()) as batches:
            for done in range(self.start + 1, steps + 1):
                values, keep_rate = self._step(done, next(batches))
                stop = preemption.requested(done)
                result = self._after(done, values, keep_rate, stop)
                if stop:
                    self.progress.note(f"stopped at step {done}; the same command continues")
                    return {**result, "step": done}
        if not result:
            result = self._evaluate(steps)
        self.store.wait()
        self._save_models()
        result = {**result, "step": steps}
        write_result(self.workdir, result)
        return result

    def _step(self, number: int, batch: dict[str, Any]) -> tuple[Metrics, object]:
        """One update; returns its metrics, perhaps still being computed, and its keep rate."""
        update, keep_rate = self.compiled.at(number - 1)
        if update is not self.update:
            self._switch(update, keep_rate, number)
        self._profile(number)
        placed = sharding.place_batch(self.mesh, batch)
        self.state, values = update(self.state, placed, self.teacher_params)
        # At most one step in flight beside this one: the host must not run away.
        jax.block_until_ready(self.previous)
        self.previous = values["loss"]
        self.progress.advance()
        return values, keep_rate

    def _switch(self, update: Any, keep_rate: object, step: int) -> None:
        if self.update is not None:
            self.progress.note(f"step {step}: keep rate {keep_rate} from here on")
        self.update = update
        self.progress.restart_clock(step - 1)

    def _after(self, step: int, values: Metrics, keep_rate: object, stop: bool) -> dict[str, float]:
        """Reports, evaluates and saves what is due after a step; returns an evaluation, if any."""
        settings = self.experiment.settings
        evaluates = _due(step, settings.eval.every_epochs, self.experiment)
        saves = stop or _due(step, settings.checkpoint.every_epochs, self.experiment)
        if step % settings.log_every == 0 or evaluates or saves:
            self._report(step, values, keep_rate)
        result = self._evaluate(step) if evaluates else {}
        if saves:
            self.store.save(step, self.state, metrics=result or None)
        if evaluates or saves:
            self.progress.restart_clock(step)
        return result

    def close(self) -> None:
        """Ends threads and files."""
        if self.profiling:
            jax.profiler.stop_trace()
        self.compiled.close()
        self.progress.close()

    def _restored(self) -> TrainState | None:
        found = self.store.restore(self.abstract)
        return None if found is None else found[1]

    def _fresh(self) -> TrainState:
        experiment = self.experiment
        placed = functools.partial(jax.jit, out_shardings=self.shardings)
        if not experiment.settings.init_from:
            return placed(experiment.random_state)()
        params = initial_params(experiment.settings, experiment.model)
        return placed(functools.partial(init_state, experiment.recipe))(params)

    def _batches(self) -> data.Batches:
        return data.train_batches(
            self.experiment.data,
            start_step=self.start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _report(self, step: int, values: Metrics, keep_rate: object) -> None:
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self.store.wait()
            good = self.store.latest_step()
            where = "none" if good is None else str(self.workdir / CHECKPOINTS / str(good))
            raise DivergedError(
                f"loss {values['loss']} with gradient norm {values['grad_norm']} at step {step}, "
                f"expected finite numbers; last good checkpoint: {where}"
            )
        self.progress.train(step, values, keep_rate)

    def _evaluate(self, step: int) -> dict[str, float]:
        """The reducer's own keep rate, the further ones, and the averaged weights if there are."""
        result = {}
        for prefix, variant in self.experiment.evaluated.items():
            if prefix not in self.evaluators:
                self.evaluators[prefix] = Evaluator(
                    variant, self.experiment.data, self.mesh, self.abstract.params
                )
            values = self.evaluators[prefix](self.state.params)
            result |= {f"{prefix}{name}": value for name, value in values.items()}
        if self.experiment.recipe.ema_decay > 0.0:
            values = self.evaluators[""](self.state.ema)
            result |= {f"ema/{name}": value for name, value in values.items()}
        self.progress.evaluation(step, result)
        return result

    def _profile(self, step: int) -> None:
        window = self.experiment.settings.profile_steps
        if window and step == window[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        if self.profiling and step == window[1] + 1:
            jax.profiler.stop_trace()
            self.profiling = False

    def _save_models(self) -> None:
        """Writes the trained weights, and their average if there is one, for `load_pretrained`."""
        whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(self.mesh))
        trees = {MODEL: self.state.params}
        if self.experiment.recipe.ema_decay > 0.0:
            trees[MODEL_EMA] = self.state.ema
        for name, tree in trees.items():
            described = describe(self.experiment.model)
            save_model(self.workdir / name, described, whole(tree), overwrite=True)


class _CompiledSteps:
    """The compiled step of every phase; the next one compiles while the present one trains."""

    def __init__(
        self, experiment: Experiment, mesh: Mesh, state: TrainState, teacher_params: PyTree
    ) -> None:
        self._experiment, self._mesh = experiment, mesh
        self._state, self._teacher_params = state, teacher_params
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._steps: dict[int, Future] = {}

    def at(self, step: int) -> tuple[Any, object]:
        """The update to call at `step`, and the keep rate of its phase."""
        index = self._experiment.phase(step)
        for wanted in (index, index + 1):
            if wanted < len(self._experiment.phases) and wanted not in self._steps:
                self._steps[wanted] = self._pool.submit(self._compile, wanted)
        return self._steps[index].result(), self._experiment.phases[index].keep_rate

    def close(self) -> None:
        """Gives up what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, index: int) -> Any:
        recipe = self._experiment.phase_recipe(index)
        return lower_train_step(recipe, self._mesh, self._state, self._teacher_params).compile()


def _due(step: int, every_epochs: float, experiment: Experiment) -> bool:
    """Whether something that happens every so many epochs happens after `step`."""
    if step == experiment.steps or every_epochs == 0.0:
        return step == experiment.steps
    period = max(every_epochs * experiment.steps_per_epoch, 1.0)
    return math.floor(step / period) > math.floor((step - 1) / period)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    define_config(None, "What to train; see configs/.")
    flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
    flags.mark_flags_as_required(["config", "workdir"])
    distributed.define_flags()


def main() -> None:
    """The command."""
    distributed.initialize()
    result = train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    define_flags()
    start.run(main)
