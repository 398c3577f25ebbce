"""The states of a training run, as Orbax writes them.

A step is written under a temporary name and renamed when it is complete, so a run that dies in the
middle of writing leaves nothing that looks like a checkpoint.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from tdm_jax.checkpoint.integrity import check, checksums, compare, read_tree, summary, verify
from tdm_jax.errors import InputError
from tdm_jax.parallel.distributed import everywhere, on_one_process

PyTree = Any
_STATE, _METADATA = "state", "metadata"  # the items of a step
_CHECKSUMS = "checksums"  # and of what is in the latter


class Store:
    """The checkpoints of one training run: the last few, and the best."""

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        best_metric: str = "top1",
        best_mode: str = "max",
        read_only: bool = False,
    ):
        """Opens a folder of checkpoints.

        Args:
          directory: made if it does not exist; each step is a folder in it.
          keep_last: how many of the latest steps to keep; at least 1.
          keep_best: how many steps to keep for their metric; may be 0.
          best_metric: the metric that counts, among those given to `save`.
          best_mode: "max" if more of it is better, "min" if less.
          read_only: change nothing; for evaluating a run that may still be going on.

        Raises:
          InputError: a setting is out of range, or the directory cannot be used.
        """
        if keep_last < 1 or keep_best < 0:
            raise InputError(
                f"expected keep_last at least 1 and keep_best at least 0; got {keep_last}, "
                f"{keep_best}"
            )
        if best_mode not in ("max", "min"):
            raise InputError(f"best_mode must be 'max' or 'min'; got {best_mode!r}")
        self._directory = epath.Path(directory).absolute()
        self._best_metric = best_metric
        self._read_only = read_only
        if not self._directory.is_dir() and (read_only or self._directory.exists()):
            raise InputError(f"{directory}: expected a folder of checkpoints")
        rank = self._rank(best_mode)
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(
                    get_metric_fn=rank, n=keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=rank,  # without it, Orbax writes no metrics and forgets the best on restart
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            lightweight_initialize=read_only,
        )
        handlers = {
            _STATE: ocp.StandardCheckpointHandler(),
            _METADATA: ocp.JsonCheckpointHandler(),
        }
        try:
            if not read_only:
                on_one_process("damaged_metrics", self._put_aside_damaged_metrics)
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise InputError(f"cannot use {directory}: {summary(error)}") from error

    def _rank(self, mode: str) -> Callable[[Mapping[str, float]], float]:
        sign = 1 if mode == "max" else -1

        def rank(metrics: Mapping[str, float]) -> float:
            # Steps without the metric come last, and NaN with them: it has no place in an order.
            if self._best_metric not in metrics or math.isnan(metrics[self._best_metric]):
                return -math.inf
            return sign * metrics[self._best_metric]

        return rank

    def _put_aside_damaged_metrics(self) -> None:
        # Orbax reads all metrics when it starts, and a torn file would keep it from starting.
        for file in self._directory.glob("*/metrics/metrics"):
            step = file.parent.parent.name
            try:
                json.loads(file.read_text())
            except ValueError as error:
                if step.isdigit():
                    logging.warning("%s: step %s is unreadable: %s", self._directory, step, error)
                    self._put_aside([int(step)])

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to write a step; returns once the arrays are copied from the devices.

        Args:
          step: later than every step saved so far, else nothing happens.
          state: arrays in any pytree; they may be donated afterwards.
          metrics: of this step; must hold the one that decides which is best.
          metadata: anything that JSON can hold, given back by `restore`.
          force: save although a later step exists.

        Returns:
          Whether the step is being saved.

        Raises:
          InputError: the deciding metric is missing from `metrics`.
        """
        if metrics is not None and self._best_metric not in metrics:
            raise InputError(
                f"the metric {self._best_metric!r} decides which checkpoint is best; got "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )
        if step in self._manager.all_steps():
            return False
        metadata = {} if metadata is None else dict(metadata)
        json.dumps(metadata)  # here, rather than in the thread that writes
        metadata[_CHECKSUMS] = checksums(state)
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
            ),
            metrics={} if metrics is None else {k: float(v) for k, v in metrics.items()},
            force=force,
        )

    def restore(
        self, abstract_state: PyTree, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest readable step.

        A damaged step is passed over with a warning and renamed to `<step>.unreadable.0`, so
        that training can write it again.

        Args:
          abstract_state: the state, or `jax.ShapeDtypeStruct`s with shardings in its place; arrays
            come back with these types and shardings, whatever wrote them.
          step: this one alone; None for the newest.

        Returns:
          (step, state, metadata), or None if nothing was saved yet.

        Raises:
          InputError: a step holds another tree than `abstract_state`, or none can be read.
        """
        if step is not None and step not in self.all_steps():
            raise InputError(f"{self._directory} has no step {step}; got {list(self.all_steps())}")
        return self._newest(lambda step: self._read(step, abstract_state), step)

    def restore_branch(self, name: str) -> tuple[int, PyTree, dict[str, Any]] | None:
        """As `restore`, but of one branch of the state alone, whose shapes need not be known.

        Args:
          name: of a field or key of the state, whose arrays come back on the host; {} where it
            has none.
        """

        def read(step: int) -> tuple[PyTree, dict[str, Any]]:
            folder = self._directory / str(step)
            tree = read_tree(folder / _STATE, name)
            metadata = json.loads((folder / _METADATA / "metadata").read_text())
            check({name: tree}, metadata.pop(_CHECKSUMS, {}))
            return tree, metadata

        return self._newest(read, branch=name)

    def _newest(
        self,
        read: Callable[[int], tuple[PyTree, dict[str, Any]]],
        step: int | None = None,
        branch: str = "",
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        self.wait()
        failed: dict[int, str] = {}
        for candidate in reversed(self.all_steps()) if step is None else [step]:
            content = self._try(candidate, read, branch, failed)
            if content is not None:
                if failed and not self._read_only:
                    on_one_process("put_aside", lambda: self._put_aside(failed))
                    self._manager.reload()
                return candidate, *content
        if failed:
            reasons = "; ".join(f"step {number}: {reason}" for number, reason in failed.items())
            raise InputError(f"{self._directory}: no checkpoint is readable ({reasons})")
        return None

    def _try(
        self,
        step: int,
        read: Callable[[int], tuple[PyTree, dict[str, Any]]],
        branch: str,
        failed: dict[int, str],
    ) -> tuple[PyTree, dict[str, Any]] | None:
        # All processes go back together, also over what only one of them could not read.
        content, reason = None, "another process cannot read it"
        readable = True
        try:
            verify(self._directory / str(step) / _STATE, branch)
        except Exception as error:  # each damaged file fails in its own way
            readable, reason = False, summary(error)
        if everywhere(readable):
            try:
                content = read(step)
            except InputError:
                raise
            except Exception as error:
                reason = summary(error)
            if everywhere(content is not None):
                return content
        failed[step] = reason
        logging.warning("%s: step %d is unreadable, going back: %s", self._directory, step, reason)
        return None

    def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        saved = self._manager.item_metadata(step)[_STATE].tree
        compare(f"{self._directory}/{step}", saved, abstract_state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), metadata=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        state, metadata = restored[_STATE], dict(restored[_METADATA])
        check(state, metadata.pop(_CHECKSUMS, {}))
        return state, metadata

    def _put_aside(self, steps: Iterable[int]) -> None:
        for step in steps:
            names = (self._directory / f"{step}.unreadable.{n}" for n in itertools.count())
            (self._directory / str(step)).rename(next(n for n in names if not n.exists()))

    def latest_step(self) -> int | None:
        """The newest step, complete or being written; None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> tuple[int, ...]:
        """Every step kept, oldest first."""
        return tuple(sorted(self._manager.all_steps()))

    def wait(self) -> None:
        """Waits until everything saved is on disk; raises what went wrong in writing."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and lets the threads go."""
        self._manager.close()
