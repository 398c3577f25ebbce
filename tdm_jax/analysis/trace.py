"""How busy devices were, by a profiler's trace: what the program's own clock says, from outside.

TensorBoard's profile plugin and xprof show the trace itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

# As `answers.Forward` and `prediction.predict` call what they run.
_PROGRAM = "jit_answers"


@contextlib.contextmanager
def taken(folder: str) -> Iterator[None]:
    """Traces what is done meanwhile, if there is a folder to write to; says how busy devices were.

    Each operation is an event: a minute's work is enough for a trace.
    """
    if not folder:
        yield
        return
    with jax.profiler.trace(folder):
        yield
    print(f"devices computing {busy(folder):.1%} of the time, by the trace in {folder}")


def busy(folder: str) -> float:
    """Share of the time, from the first answers asked for to the last, in which a device computed.

    Args:
      folder: of the trace; the latest counts.
    """
    path = max(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"))
    profile: Any = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
    spans, first = [], np.inf
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                # CPUs and GPUs name the program beside each operation, TPUs in a line of their own.
                module = event.name if line.name == "XLA Modules" else _module(event)
                if module:
                    spans.append((event.start_ns, event.end_ns))
                if module.startswith(_PROGRAM):
                    first = min(first, event.start_ns)
    computed, until = 0.0, first
    for start, end in sorted(spans):
        computed += max(0.0, end - max(start, until))
        until = max(until, end)
    return computed / (until - first)


def _module(event: Any) -> str:
    return next((value for name, value in event.stats if name == "hlo_module"), "")
