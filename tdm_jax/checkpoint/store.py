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

from tdm_jax.checkpoint.integrity import check, checksums, compare, read_tree, verify
from tdm_jax.errors import InputError, summary
from tdm_jax.parallel.distributed import everywhere, on_one_process

PyTree = Any
_STATE, _METADATA = "state", "metadata"  # the items of a step
_CHECKSUMS = "checksums"  # and of what is in the latter
_METRIC = "top1"  # which of the metrics says what step is best


class Store:
    """The checkpoints of one training run: the last few, and the best."""

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        keep_last: int = 3,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens a folder of checkpoints.

        Args:
          directory: made if it does not exist; each step is a folder in it.
          keep_last: how many of the latest steps to keep; at least 1.
          keep_best: how many steps to keep for their top-1; may be 0.
          read_only: change nothing; for evaluating a run that may still be going on.

        Raises:
          InputError: a setting is out of range, or the directory cannot be used.
        """
        if keep_last < 1 or keep_best < 0:
            raise InputError(
                f"expected keep_last at least 1 and keep_best at least 0; got {keep_last}, "
                f"{keep_best}"
            )
        self._directory = epath.Path(directory).absolute()
        self._read_only = read_only
        if not self._directory.is_dir() and (read_only or self._directory.exists()):
            raise InputError(f"{directory}: expected a folder of checkpoints")
        last = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(
            get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([last, best]),
            best_fn=_rank,  # without it, Orbax writes no metrics and forgets the best on restart
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            lightweight_initialize=read_only,
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _METADATA: ocp.JsonCheckpointHandler()}
        try:
            if not read_only:
                on_one_process("damaged_metrics", self._put_aside_damaged_metrics)
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise InputError(f"cannot use {directory}: {summary(error)}") from error

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

    def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts to write a step; returns once the arrays are copied from the devices.

        Args:
          step: later than every step saved so far, else nothing happens.
          state: arrays in any pytree; they may be donated afterwards.
          metrics: of this step; must hold "top1", which decides which step is best.

        Returns:
          Whether the step is being saved.

        Raises:
          InputError: the deciding metric is missing from `metrics`.
        """
        if metrics is not None and _METRIC not in metrics:
            raise InputError(
                f"the metric {_METRIC!r} decides which checkpoint is best; got "
                f"{', '.join(sorted(metrics)) or 'none'}"
            )
        if step in self._manager.all_steps():
            return False
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                metadata=ocp.args.JsonSave({_CHECKSUMS: checksums(state)}),
            ),
            metrics={} if metrics is None else {k: float(v) for k, v in metrics.items()},
        )

    def restore(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """Reads the newest readable step.

        A damaged step is passed over with a warning and renamed to `<step>.unreadable.0`, so
        that training can write it again.

        Args:
          abstract_state: the state, or a `jax.ShapeDtypeStruct` with a sharding for each
            array; arrays come back with these types and shardings, whatever wrote them.

        Returns:
          (step, state), or None if nothing was saved yet.

        Raises:
          InputError: the step holds another tree than `abstract_state`, or none can be read.
        """

        def read(step: int) -> PyTree:
            saved = self._manager.item_metadata(step)[_STATE].tree
            compare(f"{self._directory}/{step}", saved, abstract_state)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=args)[_STATE]

        return self._newest(read)

    def restore_branch(self, name: str) -> tuple[int, PyTree] | None:
        """As `restore`, but of one branch of the state alone, whose shapes need not be known.

        Args:
          name: of a field or key of the state, whose arrays come back on the host; {} where it
            has none.
        """
        newest = self._newest(
            lambda step: read_tree(self._directory / str(step) / _STATE, name), name
        )
        return newest and (newest[0], newest[1].get(name, {}))

    def _newest(self, read: Callable[[int], PyTree], branch: str = "") -> tuple[int, PyTree] | None:
        self.wait()
        failed: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            tree = self._try(step, read, branch, failed)
            if tree is not None:
                if failed and not self._read_only:
                    on_one_process("put_aside", lambda: self._put_aside(failed))
                    self._manager.reload()
                return step, tree
        if failed:
            reasons = "; ".join(f"step {number}: {reason}" for number, reason in failed.items())
            raise InputError(f"{self._directory}: no checkpoint is readable ({reasons})")
        return None

    def _try(
        self, step: int, read: Callable[[int], PyTree], branch: str, failed: dict[int, str]
    ) -> PyTree | None:
        # All processes go back together, also over what only one of them could not read.
        tree, readable, reason = None, True, "another process cannot read it"
        folder = self._directory / str(step)
        try:
            metadata = json.loads((folder / _METADATA / "metadata").read_text())
            verify(folder / _STATE, branch)
        except Exception as error:  # each damaged file fails in its own way
            readable, reason = False, summary(error)
        if everywhere(readable):
            try:
                tree = read(step)
                check(tree, metadata.get(_CHECKSUMS, {}))
            except InputError:
                raise
            except Exception as error:
                tree, reason = None, summary(error)
            if everywhere(tree is not None):
                return tree
        failed[step] = reason
        logging.warning("%s: step %d is unreadable, going back: %s", self._directory, step, reason)
        return None

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


def _rank(metrics: Mapping[str, float]) -> float:
    # Steps without the metric come last, and NaN with them: it has no place in an order.
    value = metrics.get(_METRIC, math.nan)
    return -math.inf if math.isnan(value) else value
