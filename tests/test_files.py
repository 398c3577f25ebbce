import stat

import pytest
from safetensors import numpy as safetensors

from tdm_jax.errors import InputError
from tdm_jax.files import replacing, write_text


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "table.md"
    write_text(path, "old")

    def dies():
        with replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        dies()
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "old"


def test_folders_are_made_and_the_old_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "table.md"
    write_text(path, "one")
    write_text(path, "zwei ↓")
    assert path.read_text(encoding="utf-8") == "zwei ↓"
    assert [p.name for p in path.parent.iterdir()] == ["table.md"]


def test_a_folder_or_a_file_in_the_way_is_one_line(tmp_path):
    with pytest.raises(InputError, match="got a folder"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="expected a writable folder"):
        write_text(tmp_path / "file" / "x.md", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_object_store_gets_what_is_whole(bucket):
    def dies():
        with replacing("gs://bucket/a/table.md") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        dies()
    assert list(bucket.iterdir()) == []
    write_text("gs://bucket/a/table.md", "whole")
    assert (bucket / "a" / "table.md").read_text() == "whole"


def test_others_may_read_what_the_system_lets_them(tmp_path):
    write_text(tmp_path / "text", "x")
    with replacing(tmp_path / "weights.safetensors") as beside:
        safetensors.save_file({}, beside)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()]
    assert len(modes) == 2 and len(set(modes)) == 1
