"""What a training run reports: a bar for people, one JSON line per event for programs."""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from tdm_jax.errors import InputError
from tdm_jax.files import is_remote
from tdm_jax.training.keep_rate_schedule import Phase
from tdm_jax.training.workdir import write_whole

STORE_SECONDS = 60.0


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
    ) -> None:
        """Args: `start` is the step that the run resumes from.

        Raises:
          InputError: TensorBoard is asked for, but tensorboardX is not installed.
        """
        self._silent = silent = jax.process_index() > 0
        self._batch_size = batch_size
        self._since = (start, time.monotonic())
        self._phase: Phase | None = None
        self._board = _tensorboard(workdir) if tensorboard and not silent else None
        if not silent:
            keep = functools.partial(_stays, step=start, evaluated=start < steps)
            self._lines = LineFile(workdir / "metrics.jsonl", keep)
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=silent,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )

    def begin(self, step: int, phase: Phase) -> None:
        """Before a step: says where a phase begins, and leaves its compilation out of images/s."""
        if phase is not self._phase:
            if self._phase is not None:
                self.note(f"step {step}: keep rate {phase.keep_rate} from here on")
            self._phase, self._since = phase, (step - 1, time.monotonic())

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def train(self, step: int, values: Mapping[str, float], keep_rate: object) -> None:
        """Reports the values of one training step."""
        done, then = self._since
        now = time.monotonic()
        rate = (step - done) * self._batch_size / max(now - then, 1e-9)
        self._since = (step, now)
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{rate:.0f}"}
        if keep_rate is not None:
            number = isinstance(keep_rate, (int, float))
            shown["keep"] = f"{keep_rate:.3g}" if number else str(keep_rate)
        self._bar.set_postfix(shown)
        self._write(step, {**values, "keep_rate": keep_rate, "images_per_second": rate})

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Reports an evaluation."""
        shown = (f"{name} {value:.2f}%" for name, value in values.items() if "top1" in name)
        self.note(f"step {step}: {', '.join(shown)}")
        self._write(step, values)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stderr)

    def flush(self, step: int) -> None:
        """All lines are written; what else was done after `step` is left out of images/s."""
        if not self._silent:
            self._lines.flush()
        self._since = (step, time.monotonic())

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        self.flush(self._since[0])
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, values: Mapping[str, object]) -> None:
        if self._silent:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._lines.add(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)


class LineFile:
    """A text file that grows by lines.

    An object store cannot append: there the whole file is written by `flush`, and by a line that
    comes `STORE_SECONDS` after the last time.
    """

    def __init__(self, path: epath.Path, keep: Callable[[str], bool]) -> None:
        """Keeps those lines of a file that is there already of which `keep` holds."""
        self._path, self._text, self._pending = path, "", False
        if path.exists():
            self._text = "".join(filter(keep, path.read_text().splitlines(keepends=True)))
            write_whole(path, self._text)
        self._written = time.monotonic()

    def add(self, line: str) -> None:
        """Adds a line."""
        if not is_remote(self._path):
            with self._path.open("a") as file:
                file.write(line)
            return
        self._text += line
        self._pending = True
        if time.monotonic() - self._written > STORE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """All lines are in the file."""
        if self._pending:
            write_whole(self._path, self._text)
            self._pending, self._written = False, time.monotonic()


def _finite(value: object) -> object:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stays(line: str, *, step: int, evaluated: bool) -> bool:
    """Whether a line is of a step up to `step`, and not one that a crash cut off.

    The evaluation after `step` itself stays if it was `evaluated` for good, else it is done again.
    """
    try:
        values = json.loads(line)
    except ValueError:
        return False
    again = values["step"] == step and "top1" in values and not evaluated
    return line.endswith("\n") and values["step"] <= step and not again


def _tensorboard(workdir: epath.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard=True needs tensorboardX, which is not installed: pip install 'tdm_jax[tb]'"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
