"""A profiler's trace of some steps of a training."""

import jax
from etils import epath


class Profiler:
    """Traces the steps from the first to the last of a window, both included."""

    def __init__(self, folder: epath.Path, window: tuple[int, ...]) -> None:
        """Writes to `folder`; an empty window traces nothing."""
        self._folder, self._window = folder, window
        self._running = False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self._window and step == self._window[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == self._window[1] + 1:
            self.close()

    def close(self) -> None:
        """Ends a trace that is being taken."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
