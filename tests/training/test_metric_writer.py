import json

import pytest
from etils import epath

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


def test_further_processes_are_silent(tmp_path, capfd):
    report = progress(tmp_path, silent=True)
    report.advance()
    report.train(1, {"loss": 1.0}, 0.5)
    report.evaluation(1, {"top1": 50.0})
    report.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""
