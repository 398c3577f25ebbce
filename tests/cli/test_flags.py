"""Shared flags: plain values, one line for what cannot be read, and --help in sentences.

Covers tdm_jax.cli.start.
"""

import importlib
import subprocess
import sys

import pytest
from absl import flags

from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError

COMMANDS = (
    *("compare", "sweep", "benchmark", "roofline", "diversity", "visualize", "report"),
    *("evaluate", "demo"),
)


@pytest.fixture
def parse():
    """Parses flags that some functions define, and takes them away again."""
    before, was_parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()

    def parse(*arguments, define):
        for function in define:
            function()
        flags.FLAGS(["test", *arguments])

    yield parse
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    if not was_parsed:
        flags.FLAGS.unparse_flags()


def test_candidates(parse):
    arguments = (
        "--models=a,b",
        "--keep_rates=0.7,0.5",
        "--layers=1,2",
        "--image_size=384",
        "--gmacs=2.3,2.9",
    )
    parse(*arguments, "--candidate=c:d:0.25:tdm/r=3:0.5", define=[shared.define_candidates])
    assert shared.candidates() == {
        "models": ["a", "b"],
        "methods": ["none"],
        "keep_rates": [0.7, 0.5],
        "candidates": [("c:d:0.25", "tdm/r=3", 0.5)],
        "gmacs": [2.3, 2.9],
        "macs_ratios": [],
        "layers": [1, 2],
        "image_size": 384,
    }


def test_data_are_what_is_said_and_no_more(parse):
    arguments = ("--data=folder", "--data_dir=x", "--mean=0.5", "--crop_pct=0.9")
    parse(*arguments, define=[shared.define_data])
    assert shared.data() == {
        "name": "folder",
        "data_dir": "x",
        "eval_batch_size": 64,
        "mean": [0.5],
        "crop_pct": 0.9,
    }


def test_no_data(parse):
    parse(define=[shared.define_data])
    assert shared.data() == {}
    with pytest.raises(InputError, match="diversity needs images; expected --data; got none"):
        shared.data("diversity needs images")


def test_output_is_a_folder_or_nothing(parse, tmp_path):
    parse(define=[lambda: shared.define_output("tables")])
    assert shared.output() is None
    for folder in (tmp_path, tmp_path / "new"):
        flags.FLAGS.output = str(folder)
        assert shared.output() == folder
    (tmp_path / "file").touch()
    flags.FLAGS.output = str(tmp_path / "file")
    with pytest.raises(InputError, match=r"--output: expected a folder; got the file .*/file"):
        shared.output()


@pytest.mark.parametrize(
    ("argument", "read", "message"),
    [
        ("--layers=1,x", shared.candidates, "--layers: expected numbers; got '1,x'"),
        ("--candidate=a:b", shared.candidates, "expected MODEL:METHOD:KEEP_RATE; got 'a:b'"),
        ("--entry=a:b:c", shared.candidates, "expected MODEL:METHOD:KEEP_RATE; got 'a:b:c'"),
    ],
)
def test_what_cannot_be_read(argument, read, message, parse):
    parse(argument, define=[shared.define_candidates])
    with pytest.raises(InputError, match=message):
        read()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence(command):
    """Each begins as a sentence does, and ends as one."""
    before = set(flags.FLAGS)
    try:
        importlib.import_module(f"tdm_jax.{command}").define_flags()
        own = [name for name in set(flags.FLAGS) - before if "." not in name]
        texts = {name: flags.FLAGS[name].help for name in own}
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    assert texts
    for name, text in texts.items():
        text = text.partition(">: ")[2] if text.startswith("<") else text
        text = text.partition(";\n")[0]  # absl's own words
        assert text[:1].isupper() or text.startswith(f"{name} "), (name, text)
        assert text.endswith("."), (name, text)


def test_help_lists_what_commands_share():
    command = [sys.executable, "-m", "tdm_jax.roofline", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for name in ("models", "keep_rates", "num_heads", "tflops", "output"):
        assert f"--{name}: " in done.stdout


def test_notes_go_to_standard_error(capsys):
    start.note("measuring")
    assert capsys.readouterr() == ("", "measuring\n")


@pytest.mark.parametrize("argument", ["--unknown=3", "stray"])
def test_bad_arguments_are_one_line_and_code_2(argument):
    code = "from tdm_jax.cli import start; start.run(lambda: None)"
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
