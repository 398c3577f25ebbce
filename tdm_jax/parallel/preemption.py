"""Whether this run has been asked to stop: SIGTERM here, or a preemption notice to any process."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notices a request to stop while it is entered as a context.

    One process listens to SIGTERM itself. Several must stop at the same step: there jax's
    coordination service listens, and all processes learn of the same step to stop at.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None

    def __enter__(self) -> "Preemption":
        # Only the main thread may install handlers; a run in another cannot be signalled.
        self._listens = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. To be asked after every step: a notice shows only once."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled
