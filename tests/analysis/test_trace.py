"""How busy a device was, from a trace that is written by hand and from a real one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tdm_jax.analysis import trace


def event(start, end, module="", name="fusion"):
    stats = [("hlo_op", name), ("hlo_module", module)] if module else [("bytes", 8)]
    return SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=stats)


def line(name, *events):
    return SimpleNamespace(name=name, events=events)


@pytest.mark.parametrize("modules", [True, False])
def test_overlapping_events_count_once(modules, monkeypatch, tmp_path):
    calls = [(10, 20, "jit_answers"), (18, 30, "jit_answers"), (60, 90, "jit_per_example")]
    before = (0, 5, "jit_init")
    if modules:
        lines = [line("XLA Modules", *(event(s, e, name=f"{m}(7)") for s, e, m in calls))]
    else:
        lines = [line("one core", event(*before), event(*calls[0]), event(*calls[2]))]
        lines += [line("another", event(*calls[1])), line("host", event(0, 1000))]
    plane = SimpleNamespace(lines=lines)
    profile = SimpleNamespace(from_serialized_xspace=lambda _: SimpleNamespace(planes=[plane]))
    monkeypatch.setattr(jax.profiler, "ProfileData", profile)
    path = tmp_path / "plugins" / "profile" / "now"
    path.mkdir(parents=True)
    (path / "host.xplane.pb").write_bytes(b"")
    assert trace.busy(str(tmp_path)) == (20 + 30) / 80


# Python 3.12 misses a module's name in JAX's class, and as an error that aborts.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_a_real_trace(tmp_path, capsys):
    def answers(x):
        return jnp.tanh(x @ x).sum()

    program = jax.jit(answers)
    with trace.taken(str(tmp_path)):
        for _ in range(3):
            program(jnp.ones((200, 200))).block_until_ready()
    assert 0 < trace.busy(str(tmp_path)) <= 1
    assert "% of the time, by the trace in" in capsys.readouterr().out
    with trace.taken(""):
        pass
    assert capsys.readouterr().out == ""
