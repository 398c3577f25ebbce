import numpy as np
import pytest

from tdm_jax.data import tfrecord
from tdm_jax.data.tfrecord import Shard, TFRecordReader
from tdm_jax.errors import InputError
from tests.data.files import crc32c, masked, write_tfrecord


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    return [rng.bytes(int(size)) for size in rng.integers(0, 200, 23)]


@pytest.fixture
def shards(tmp_path, records):
    """Three files of 5, 0 and 18 records."""
    made = []
    for number, part in enumerate((records[:5], [], records[5:])):
        path = tmp_path / f"set-train.tfrecord-{number:05d}-of-00003"
        write_tfrecord(path, part)
        made.append(Shard(path, 0, len(part), len(part)))
    return made


def test_checksum_has_its_published_value():
    # RFC 3720, B.4, and the mask of TFRecord.
    assert crc32c(b"123456789") == 0xE3069283
    rows = np.frombuffer(b"123456789\x00" * 1, np.uint8)[None, :9]
    got = int(tfrecord.masked_crc32c(rows)[0])
    assert got == int.from_bytes(masked(b"123456789"), "little")


def test_every_record_by_its_number(shards, records):
    reader = TFRecordReader(shards)
    assert len(reader) == 23
    order = np.random.default_rng(1).permutation(23)
    assert [reader[int(i)] for i in order] == [records[i] for i in order]
    with pytest.raises(IndexError):
        reader[23]


def test_part_of_a_file(shards, records):
    parts = [Shard(shards[0].path, 3, 2, 5), Shard(shards[2].path, 1, 4, 18)]
    reader = TFRecordReader(parts)
    assert [reader[i] for i in range(6)] == records[3:5] + records[6:10]


def test_the_index_is_kept_and_used(shards, records, monkeypatch):
    TFRecordReader(shards)
    kept = shards[0].path.parent / tfrecord.INDEX_DIRECTORY
    assert sorted(path.name for path in kept.iterdir()) == [f"{s.path.name}.npy" for s in shards]

    def refuse(path):
        raise AssertionError(f"{path} was walked again")

    monkeypatch.setattr(tfrecord, "index_file", refuse)
    reader = TFRecordReader(shards)
    assert [reader[i] for i in range(23)] == records


def test_an_index_that_does_not_fit_the_file_is_replaced(shards, records):
    TFRecordReader(shards)
    write_tfrecord(shards[0].path, records[:4])
    kept = shards[2].path.parent / tfrecord.INDEX_DIRECTORY / f"{shards[2].path.name}.npy"
    kept.write_bytes(kept.read_bytes()[:50])
    reader = TFRecordReader([Shard(shards[0].path, 0, 4, 4), *shards[1:]])
    assert [reader[i] for i in range(22)] == records[:4] + records[5:]


def test_without_a_place_to_keep_the_index(shards, records):
    # A file where the directory should be: as good as a read-only directory, for root too.
    (shards[0].path.parent / tfrecord.INDEX_DIRECTORY).write_text("in the way")
    reader = TFRecordReader(shards)
    assert [reader[i] for i in range(23)] == records


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_truncated_file(shards, cut):
    path = shards[2].path
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="is truncated: its record at byte"):
        TFRecordReader(shards)


def test_damaged_length(shards):
    path = shards[2].path
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged at byte 0: a record's length"):
        TFRecordReader(shards)


def test_another_kind_of_file(shards):
    shards[0].path.write_bytes(b"this is a text file, and a rather long one at that")
    with pytest.raises(InputError, match="is no TFRecord file"):
        TFRecordReader(shards)


def test_another_number_of_records(shards):
    wrong = Shard(shards[0].path, 0, 6, 6)
    with pytest.raises(InputError, match="holds 5 records, expected 6"):
        TFRecordReader([wrong])


def test_missing_file(shards, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        TFRecordReader([Shard(tmp_path / "nowhere", 0, 1, 1)])
