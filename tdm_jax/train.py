"""Trains a model: `python -m tdm_jax.train --config=configs/digits.py --workdir=...`.

The same command continues an interrupted run, on any number of devices. The working directory holds
`config.json`, `metrics.jsonl`, `checkpoints/`, and at the end `model/` (what `load_pretrained`
reads) and `result.json`.
"""

import functools
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict, config_flags

from tdm_jax import cli, data, distributed, partition
from tdm_jax.checkpoint import Store, describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.evaluate import Evaluator
from tdm_jax.experiment import (
    CHECKPOINTS,
    CONFIG,
    MODEL,
    MODEL_EMA,
    Experiment,
    initial_params,
    load_teacher,
    make_experiment,
)
from tdm_jax.files import write_text
from tdm_jax.keep_rate import at_keep_rate
from tdm_jax.preemption import Preemption
from tdm_jax.progress import Progress
from tdm_jax.settings import parse
from tdm_jax.train_step import TrainState, init_state, lower_train_step

_RESULT = "result.json"
# What may change when a run is continued: where and how it runs, not what it computes.
_FREE = (
    "mesh.",
    "eval.",
    "checkpoint.",
    "log_every",
    "tensorboard",
    "profile_steps",
    "data.data_dir",
    "data.threads",
    "data.workers",
    "data.max_corrupt",
    "data.eval_batch_size",
)


class DivergedError(InputError):
    """The loss or the gradient is no longer finite."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains to the end, or continues from the last checkpoint in `workdir`.

    Args:
      config: see `settings.Settings`.
      workdir: made if it does not exist; what is in it belongs to one run. A run that was finished
        there is not repeated.

    Returns:
      The last evaluation (`top1`, `top5` in percent, `loss`, ...) and `step`, the number of steps
      done: fewer than asked for if the run was told to stop.

    Raises:
      InputError: the configuration cannot be, or `workdir` holds a run of another one.
      DivergedError: the loss is no longer finite; the last good checkpoint stays.
    """
    settings = parse(config)
    workdir = Path(workdir)
    teacher, teacher_params = load_teacher(settings)
    experiment = make_experiment(settings, teacher=teacher)
    mesh = partition.make_mesh(settings.mesh)
    partition.check_batch(
        mesh, experiment.data.batch_size, accumulate=settings.accumulate, name="data.batch_size"
    )
    _claim(workdir, config)
    if (workdir / _RESULT).exists():
        return json.loads((workdir / _RESULT).read_text(encoding="utf-8"))
    run = _Run(experiment, mesh, workdir, teacher_params)
    try:
        return run.train()
    finally:
        run.close()


class _Run:
    """One training with its files."""

    def __init__(
        self, experiment: Experiment, mesh: Mesh, workdir: Path, teacher_params: PyTree
    ) -> None:
        self.experiment, self.mesh, self.workdir = experiment, mesh, workdir
        keep = experiment.settings.checkpoint
        self.store = Store(
            workdir / CHECKPOINTS, keep_last=keep.keep_last, keep_best=keep.keep_best
        )
        abstract = experiment.abstract_state()
        self.shardings = partition.state_shardings(mesh, abstract)
        self.abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.shardings,
        )
        self.teacher_params = jax.device_put(
            teacher_params, partition.state_shardings(mesh, teacher_params)
        )
        self.state = self._restored() or self._fresh()
        self.profiling = False
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
        settings, steps = self.experiment.settings, self.experiment.steps
        result: dict[str, float] = {}
        batches = self._batches()
        previous = None
        with Preemption() as preemption:
            for done in range(self.start + 1, steps + 1):
                update, keep_rate = self.compiled.at(done - 1)
                self._profile(done)
                batch = partition.place_batch(self.mesh, next(batches))
                self.state, values = update(self.state, batch, self.teacher_params)
                # At most one step in flight beside this one: the host must not run away.
                jax.block_until_ready(previous)
                previous = values["loss"]
                self.progress.advance()
                stop = preemption.requested(done)
                evaluates = _due(done, settings.eval.every_epochs, self.experiment)
                saves = stop or _due(done, settings.checkpoint.every_epochs, self.experiment)
                if done % settings.log_every == 0 or evaluates or saves:
                    self._report(done, values, keep_rate)
                if evaluates:
                    result = self._evaluate(done)
                if saves:
                    self._save(done, result if evaluates else None)
                if stop:
                    self.progress.note(f"stopped at step {done}; the same command continues")
                    return {**result, "step": done}
        if not result:
            result = self._evaluate(steps)
        self._finish(result)
        return {**result, "step": steps}

    def close(self) -> None:
        """Ends threads and files; what is being saved is saved to the end."""
        if self.profiling:
            jax.profiler.stop_trace()
        self.compiled.close()
        self.progress.close()
        self.store.close()

    def _restored(self) -> TrainState | None:
        found = self.store.restore(self.abstract)
        return None if found is None else found[1]

    def _fresh(self) -> TrainState:
        experiment = self.experiment
        if not experiment.settings.init_from:
            start = lambda: init_state(experiment.recipe, experiment.random_params())  # noqa: E731
            return jax.jit(start, out_shardings=self.shardings)()
        params = initial_params(experiment.settings, experiment.model)
        start = jax.jit(
            functools.partial(init_state, experiment.recipe), out_shardings=self.shardings
        )
        return start(params)

    def _batches(self) -> data.Batches:
        return data.train_batches(
            self.experiment.data,
            start_step=self.start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _report(self, step: int, values: dict[str, jax.Array], keep_rate: object) -> None:
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
        model, rates = self.experiment.model, self.experiment.settings.eval.keep_rates
        variants = {"": model} | {
            f"keep{rate:g}/": model.clone(reducer=at_keep_rate(model.reducer, rate))
            for rate in rates
        }
        result = {}
        for prefix, variant in variants.items():
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

    def _save(self, step: int, result: dict[str, float] | None) -> None:
        self.store.save(step, self.state, metrics=result)

    def _profile(self, step: int) -> None:
        window = self.experiment.settings.profile_steps
        if window and step == window[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        if self.profiling and step == window[1] + 1:
            jax.profiler.stop_trace()
            self.profiling = False

    def _finish(self, result: dict[str, float]) -> None:
        """Writes the trained model and the result, each whole or not at all."""
        whole = jax.jit(lambda tree: tree, out_shardings=partition.replicated(self.mesh))
        config = describe(self.experiment.model)
        save_model(self.workdir / MODEL, config, whole(self.state.params), overwrite=True)
        if self.experiment.recipe.ema_decay > 0.0:
            save_model(self.workdir / MODEL_EMA, config, whole(self.state.ema), overwrite=True)
        if jax.process_index() == 0:
            line = {"step": self.experiment.steps, **result}
            write_text(self.workdir / _RESULT, json.dumps(line, indent=2) + "\n")


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


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Marks `workdir` as this run's; refuses it if it is another's."""
    mine = json.loads(config.to_json_best_effort())
    path = workdir / CONFIG
    if path.exists():
        theirs = _flat(json.loads(path.read_text(encoding="utf-8")))
        wanted = _flat(mine)
        changed = [
            f"{key} is {theirs.get(key)!r} there and {wanted.get(key)!r} here"
            for key in sorted(theirs.keys() | wanted.keys())
            if theirs.get(key) != wanted.get(key) and not key.startswith(_FREE)
        ]
        if changed:
            raise InputError(
                f"{workdir} holds a run of another configuration: {'; '.join(changed[:5])}; "
                "expected the same one, or a new workdir"
            )
    if jax.process_index() == 0:
        write_text(path, json.dumps(mine, indent=2) + "\n")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    config_flags.DEFINE_config_file("config", None, "What to train; see configs/.")
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
    cli.run(main)
