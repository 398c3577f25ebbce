"""The compiled training step of every phase; the next one compiles while the present one trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from jax.sharding import Mesh
from jaxtyping import PyTree

from tdm_jax.training.experiment import Experiment
from tdm_jax.training.keep_rate_schedule import Phase
from tdm_jax.training.step import lower_train_step


class CompiledSteps:
    """The steps of one experiment on one mesh."""

    def __init__(self, experiment: Experiment, mesh: Mesh, teacher_variables: PyTree) -> None:
        """Of the teacher's variables shapes suffice."""
        self._experiment, self._mesh = experiment, mesh
        self._abstract = experiment.abstract_state(), teacher_variables
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._compiled: dict[int, Future] = {}

    def at(self, step: int) -> tuple[Callable, Phase]:
        """The update that follows `step` others, and the phase that it belongs to."""
        phases, present = self._experiment.phases, self._experiment.phase(step)
        for index in range(present, min(present + 2, len(phases))):
            if index not in self._compiled:
                self._compiled[index] = self._pool.submit(self._compile, index)
        return self._compiled[present].result(), phases[present]

    def close(self) -> None:
        """Gives up what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, index: int) -> Callable:
        recipe = self._experiment.phase_recipe(index)
        return lower_train_step(recipe, self._mesh, *self._abstract).compile()
