"""A configuration is found below the working folder, else in the package; errors are one line."""

import pytest
from absl import flags

from tdm_jax.cli.config import define_config


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parses the flags of a command with --config, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def parse(*arguments, default=None):
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        values = flags.FlagValues()
        define_config(default, "What to train.", values)
        values(["train", *arguments])
        return values.config

    return parse


def test_a_shipped_file_is_found_from_any_folder(parse):
    config = parse("--config=configs/deit_small_finetune.py", "--config.epochs=3")
    assert config.model.name == "deit_small_patch16_224"
    assert config.epochs == 3.0


def test_the_working_folder_comes_first(parse, tmp_path):
    (tmp_path / "configs").mkdir()
    mine = "def get_config(size):\n    return {'width': int(size)}"
    (tmp_path / "configs/digits.py").write_text(mine)
    assert parse("--config=configs/digits.py:7") == {"width": 7}


def test_a_default_is_found_too(parse):
    assert parse(default="configs/digits.py").data.name == "digits"
    assert parse() is None


def test_no_such_file(parse):
    with pytest.raises(flags.Error, match=r"no file configs/digts\.py; .*, configs/digits\.py"):
        parse("--config=configs/digts.py")
