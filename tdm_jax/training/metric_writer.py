"""What a training run reports: a bar for people, one JSON line per event for programs."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from tdm_jax.errors import InputError
from tdm_jax.training.workdir import append, write_whole


class Progress:
    """Reports of one run. Only the first process reports; elsewhere nothing happens.

    Lines of `metrics.jsonl` hold `step` and either a training step's values or an evaluation's. A
    resumed run drops the lines of the steps that it is going to repeat.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        tensorboard: bool = False,
        silent: bool = False,
    ) -> None:
        """Args: `start` is the step that the run resumes from, `silent` is for further processes.

        Raises:
          InputError: TensorBoard is asked for, but tensorboardX is not installed.
        """
        self._silent = silent
        self._batch_size = batch_size
        self._since = (start, time.monotonic())
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=silent,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )
        self._board = None
        if silent:
            return
        if tensorboard:
            self._board = _tensorboard(workdir)
        self._path = workdir / "metrics.jsonl"
        _keep_until(self._path, start, evaluated=start < steps)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def restart_clock(self, step: int) -> None:
        """Leaves the time since the last report (a compilation, an evaluation) out of images/s."""
        self._since = (step, time.monotonic())

    def train(self, step: int, values: Mapping[str, float], keep_rate: object) -> None:
        """Reports the values of one training step."""
        done, then = self._since
        now = time.monotonic()
        rate = (step - done) * self._batch_size / max(now - then, 1e-9)
        self._since = (step, now)
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{rate:.0f}"}
        if keep_rate is not None:
            shown["keep"] = (
                f"{keep_rate:.3g}" if isinstance(keep_rate, (int, float)) else str(keep_rate)
            )
        self._bar.set_postfix(shown)
        self._write(step, {**values, "keep_rate": keep_rate, "images_per_second": rate})

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Reports an evaluation."""
        shown = ", ".join(
            f"{name} {value:.2f}%" for name, value in values.items() if "top1" in name
        )
        self.note(f"step {step}: {shown}")
        self._write(step, values)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, values: Mapping[str, object]) -> None:
        if self._silent:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        append(self._path, json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)


def _finite(value: object) -> object:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: epath.Path, step: int, *, evaluated: bool) -> None:
    """Drops the lines after `step`, and a last line that a crash cut off.

    The evaluation after `step` itself is kept if it was `evaluated` for good, else done again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        again = values["step"] == step and "top1" in values and not evaluated
        if line.endswith("\n") and values["step"] <= step and not again:
            kept.append(line)
    write_whole(path, "".join(kept))


def _tensorboard(workdir: epath.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard=True needs tensorboardX, which is not installed: pip install tdm_jax[tb]"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
