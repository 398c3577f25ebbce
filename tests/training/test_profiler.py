import pytest
from etils import epath

from tdm_jax.training import profiler


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [
        ((), 5, []),
        ((2, 3), 5, [("start", 2), ("stop", 4)]),
        ((2, 2), 5, [("start", 2), ("stop", 3)]),
        ((4, 9), 5, [("start", 4), ("stop", None)]),
    ],
)
def test_a_window_of_steps_is_traced(window, steps, expected, monkeypatch, tmp_path):
    calls, step = [], None
    trace = profiler.jax.profiler
    monkeypatch.setattr(trace, "start_trace", lambda folder: calls.append(("start", step)))
    monkeypatch.setattr(trace, "stop_trace", lambda: calls.append(("stop", step)))
    traced = profiler.Profiler(epath.Path(tmp_path), window)
    for step in range(1, steps + 1):
        traced.before(step)
    step = None
    traced.close()
    assert calls == expected
