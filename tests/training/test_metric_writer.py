import itertools
import json

import pytest
from etils import epath

from tdm_jax.training import metric_writer
from tdm_jax.training.metric_writer import Progress


def progress(workdir, start=0, steps=10, **settings):
    return Progress(epath.Path(workdir), start=start, steps=steps, batch_size=4, **settings)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_of(workdir):
    return [line["step"] for line in lines_of(workdir)]


@pytest.fixture
def interrupted(tmp_path):
    report = progress(tmp_path)
    for step in (2, 4, 6):
        report.train(step, {"loss": 1.0 / step, "grad_norm": float("inf")}, (0.7, 0.5))
    report.evaluation(6, {"top1": 50.0})
    report.close()
    return tmp_path


def test_lines_are_json_even_of_what_json_cannot_say(interrupted):
    lines = lines_of(interrupted)
    assert lines[0]["loss"] == 0.5
    assert lines[0]["grad_norm"] is None
    assert lines[0]["keep_rate"] == [0.7, 0.5]
    assert lines[-1] == {"step": 6, "top1": 50.0}


def test_a_resumed_run_drops_what_it_repeats(interrupted):
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    report = progress(interrupted, start=4)
    assert steps_of(interrupted) == [2, 4]
    report.train(6, {"loss": 0.1}, None)
    report.close()
    assert steps_of(interrupted) == [2, 4, 6]


def test_only_the_last_evaluation_is_done_again(interrupted):
    progress(interrupted, start=6).close()
    assert steps_of(interrupted) == [2, 4, 6, 6]
    progress(interrupted, start=6, steps=6).close()
    assert steps_of(interrupted) == [2, 4, 6]


def test_a_store_is_written_now_and_then(tmp_path, monkeypatch):
    """It cannot append: what is written must not grow with the square of the lines."""
    written = []

    def write(path, text):
        written.append(len(text))
        path.write_text(text)

    monkeypatch.setattr(metric_writer, "is_remote", lambda path: True)
    monkeypatch.setattr(metric_writer, "write_whole", write)
    clock = itertools.count()
    monkeypatch.setattr(metric_writer.time, "monotonic", lambda: next(clock) / 10)
    report = progress(tmp_path, steps=1000)
    for step in range(1, 1001):
        report.train(step, {"loss": 1.0 / step}, 0.7)
        if step == 500:
            report.evaluation(step, {"top1": 50.0})
            report.flush(step)
            assert steps_of(tmp_path) == [*range(1, 501), 500]
    report.close()
    assert steps_of(tmp_path) == [*range(1, 501), 500, *range(501, 1001)]
    # Every sixty seconds, at the flush and at the end, rather than a thousand times.
    assert len(written) < 8
    assert sum(written) < 5 * written[-1]
    progress(tmp_path, start=1000, steps=1000).close()
    assert written[-1] == written[-2]


def test_further_processes_are_silent(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(metric_writer.jax, "process_index", lambda: 1)
    report = progress(tmp_path)
    report.advance()
    report.train(1, {"loss": 1.0}, 0.5)
    report.evaluation(1, {"top1": 50.0})
    report.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""
