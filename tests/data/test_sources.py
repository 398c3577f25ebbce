"""Digits, folders and TFDS sets as sources of examples.

Covers data/source.py, data/folder_source.py and data/tfds_source.py.
"""

import collections
import subprocess
import sys

import numpy as np
import pytest

from tdm_jax import data
from tdm_jax.data import images
from tdm_jax.errors import InputError
from tests.data.files import encode, number_of, numbered


def decoded(record):
    return np.asarray(images.load(images.open_image(record["image"]), 3))


def contents(source):
    return [(number_of(decoded(source[i])), source[i]["label"]) for i in range(len(source))]


def folder_config(root, **values):
    return data.make_config(name="folder", data_dir=str(root), **values)


def test_digits_are_split_by_class():
    config = data.make_config(name="digits")
    train, test = (data.open_source(config, split) for split in ("train", "validation"))
    assert (len(train), len(test)) == (1437, 360)
    counts = collections.Counter(test[i]["label"] for i in range(360))
    assert sorted(counts) == list(range(10))
    assert all(34 <= count <= 38 for count in counts.values())
    rows = {source.describe(i) for source in (train, test) for i in range(len(source))}
    assert len(rows) == 1797
    image = train[0]["image"]
    assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
    assert max(train[i]["image"].max() for i in range(20)) == 255


def test_scikit_learn_is_imported_only_for_digits():
    code = "import sys, tdm_jax.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_folder_of_splits(folder):
    root = folder({"train": [2, 3], "val": [1, 1]})
    config = folder_config(root)
    train = data.open_source(config, "train")
    assert contents(train) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]
    assert train.class_names == ("class_0", "class_1")
    assert train.describe(2) == str(root / "train" / "class_1" / "002.png")
    assert contents(data.open_source(config, "validation")) == [(0, 0), (1, 1)]


def test_validation_labels_follow_the_training_classes(folder):
    root = folder({"train": [1, 1, 1], "validation": [1, 1, 1]})
    (root / "validation" / "class_0" / "000.png").unlink()
    (root / "validation" / "class_0").rmdir()
    source = data.open_source(folder_config(root), "validation")
    assert contents(source) == [(1, 1), (2, 2)]
    assert source.num_classes == 3


def test_named_splits(folder):
    root = folder({"training": [2], "val": [1], "holdout": [3]})
    config = folder_config(root, train_split="training", validation_split="holdout")
    assert len(data.open_source(config, "train")) == 2
    assert len(data.open_source(config, "validation")) == 3


def test_validation_alone_serves_evaluation(folder):
    config = folder_config(folder({"val": [1, 2]}))
    assert data.num_examples(config, "validation") == 3
    assert data.num_classes(config) == 2
    with pytest.raises(InputError, match=r"no folder train in .*; it has val"):
        data.num_examples(config, "train")


def test_bare_classes_are_split_by_name(folder):
    root = folder({".": [10, 5, 2]})
    config = folder_config(root, holdout=0.2)
    train, held = (contents(data.open_source(config, s)) for s in ("train", "validation"))
    assert collections.Counter(label for _, label in train) == {0: 8, 1: 4, 2: 1}
    assert collections.Counter(label for _, label in held) == {0: 2, 1: 1, 2: 1}
    assert sorted(number for number, _ in train + held) == list(range(17))
    # The choice hangs on the names alone; a new file elsewhere changes nothing.
    (root / "class_2" / "new.png").write_bytes(encode(numbered(99)))
    config = folder_config(f"{root}/", holdout=0.2)
    again = contents(data.open_source(config, "validation"))
    assert [pair for pair in again if pair[1] < 2] == [pair for pair in held if pair[1] < 2]


def test_other_files_are_passed_over_and_nested_ones_found(folder):
    root = folder({"train": [1], "val": [1]})
    (root / "train" / "class_0" / "notes.txt").write_text("no picture")
    (root / "train" / "class_0" / ".hidden.png").write_text("no picture")
    nested = root / "train" / "class_0" / "deeper"
    nested.mkdir()
    (nested / "5.JPEG").write_bytes(encode(numbered(5), "PNG"))
    assert contents(data.open_source(folder_config(root), "train")) == [(0, 0), (5, 0)]


def test_folders_that_cannot_serve(folder, tmp_path):
    def error(root, split="train", **values):
        with pytest.raises(InputError) as caught:
            data.open_source(folder_config(root, **values), split)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot read the data directory" in error(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no folders at all; expected train and val folders" in error(empty)
    root = folder({"train": [1, 1]})
    assert "no folder validation or val or test" in error(root, "validation")
    assert "no folder exam in" in error(root, "validation", validation_split="exam")
    (root / "train" / "class_2").mkdir()
    assert "no images in these class folders" in error(root)
    assert "class_2" in error(root)
    (root / "val" / "class_7").mkdir(parents=True)
    assert "lacks: class_7" in error(root, "validation")
    (root / "empty_split").mkdir()
    assert "no class folders in" in error(root, train_split="empty_split")
    single = tmp_path / "single"
    (single / "only").mkdir(parents=True)
    assert "too few images in only" in error(single)


def test_photos_are_those_of_a_folder_at_any_depth(folder):
    root = folder({"a": [2], "b/deep": [1]})
    source = data.open_source(data.make_config(name="photos", data_dir=str(root)), "validation")
    assert contents(source) == [(0, 0), (1, 0), (0, 0)]
    assert source.class_names == ()


def test_photos_are_those_of_a_list(folder, tmp_path):
    root = folder({"a": [3]})
    listed = root / "list.txt"
    own, other = "a/class_0/002.png", tmp_path / "other.png"
    other.write_bytes(encode(numbered(9)))
    listed.write_text(f"{own}\n\n{other}\n{own}\na/missing.png\n")
    source = data.open_source(data.make_config(name="photos", data_dir=str(listed)), "validation")
    assert [number_of(decoded(source[i])) for i in range(3)] == [2, 9, 2]
    assert source.describe(3) == str(root / "a/missing.png")
    with pytest.raises(OSError, match="missing"):
        source[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "no images in the list .*list.txt"),
        (b"\xff\xd8\xff", "not readable.*on each line"),
    ],
)
def test_a_list_that_is_none(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    config = data.make_config(name="photos", data_dir=str(tmp_path / "list.txt"))
    with pytest.raises(InputError, match=message):
        data.open_source(config, "validation")


def test_folders_and_lists_in_a_bucket(folder, bucket):
    root = folder({"train": [2, 1], "val": [1, 1]})
    place = f"gs://bucket/{root.relative_to(bucket)}"
    train = data.open_source(folder_config(place), "train")
    assert contents(train) == [(0, 0), (1, 0), (2, 1)]
    assert train.describe(2) == f"{place}/train/class_1/002.png"
    photos = data.make_config(name="photos", data_dir=f"{place}/val")
    assert contents(data.open_source(photos, "validation")) == [(0, 0), (1, 0)]
    (root / "list.txt").write_text(f"val/class_1/001.png\n{place}/val/class_0/000.png\n")
    listed = data.make_config(name="photos", data_dir=f"{place}/list.txt")
    assert contents(data.open_source(listed, "validation")) == [(1, 0), (0, 0)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["digits", "grey", "photos"])
def test_every_source_gives_as_many_channels_as_asked_for(kind, channels, folder):
    name = "digits"
    if kind != "digits":
        name, root = "folder", folder({"train": [1, 1], "val": [1, 1]})
        if kind == "grey":
            for path in root.rglob("*.png"):
                path.write_bytes(encode(np.full((20, 24), 7, np.uint8)))
    values = {} if name == "digits" else {"data_dir": str(root)}
    config = data.make_config(
        name=name, channels=channels, image_size=8, batch_size=2, threads=1, **values
    )
    for batches in (data.train_batches(config), data.eval_batches(config)):
        image = next(batches)["image"]
        assert image.shape == (2, 8, 8, channels)
        assert kind == "photos" or (image == image[..., :1]).all()
        batches.close()


def test_a_folder_without_a_place():
    with pytest.raises(InputError, match="data_dir is empty; data.name='folder' needs"):
        data.num_examples(data.make_config(name="folder"), "train")


def test_unknown_split():
    with pytest.raises(InputError, match="did you mean 'validation'"):
        data.num_examples(data.make_config(name="digits"), "valid")


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
class TestTfds:
    def config(self, root, name="tfds:toy", **values):
        return data.make_config(name=name, data_dir=str(root), **values)

    def test_examples_and_classes(self, tfds_set, file_format):
        config = self.config(tfds_set(file_format, {"train": 9, "validation": 4}))
        expected = [(number, number % 3) for number in range(9)]
        assert contents(data.open_source(config, "train")) == expected
        assert contents(data.open_source(config, "validation")) == expected[:4]
        assert data.class_names(config) == ("ant", "bee", "cat")
        assert data.num_classes(config) == 3

    def test_slices_of_splits(self, tfds_set, file_format):
        root = tfds_set(file_format, {"train": 10})
        config = self.config(root, train_split="train[:80%]", validation_split="train[80%:]")
        numbers = [[n for n, _ in contents(data.open_source(config, split))]
                   for split in ("train", "validation")]  # fmt: skip
        assert numbers == [list(range(8)), [8, 9]]

    def test_test_split_where_there_is_no_other(self, tfds_set, file_format):
        config = self.config(tfds_set(file_format, {"train": 4, "test": 3}))
        assert data.num_examples(config, "validation") == 3

    def test_newest_or_named_version(self, tfds_set, file_format):
        for version, count in (("1.0.0", 2), ("1.10.0", 4), ("1.9.0", 3)):
            root = tfds_set(file_format, {"train": count}, version=version)
        assert data.num_examples(self.config(root), "train") == 4
        assert data.num_examples(self.config(root, "tfds:toy:1.9.0"), "train") == 3

    def test_builder_configs(self, tfds_set, file_format):
        root = tfds_set(file_format, {"train": 4}, name="toy/small")
        assert data.num_examples(self.config(root, "tfds:toy/small"), "train") == 4
        with pytest.raises(InputError, match=r"several configs in .*: small; name one"):
            data.num_examples(self.config(root), "train")

    def test_what_is_missing(self, tfds_set, file_format, tmp_path):
        root = tfds_set(file_format, {"train": 4})
        with pytest.raises(InputError, match=r"no prepared toys in .*dataset_info.json"):
            data.num_examples(self.config(root, "tfds:toys"), "train")
        with pytest.raises(
            InputError, match="unknown split of toy 'training'; did you mean 'train'"
        ):
            data.num_examples(self.config(root, train_split="training"), "train")
        (root / "toy" / "1.0.0" / f"toy-train.{file_format}-00001-of-00002").unlink()
        with pytest.raises(InputError, match=r"1 of 2 files are missing, first .*00001-of-00002"):
            data.num_examples(self.config(root, train_split="train[1:]"), "train")

    def test_places_of_examples(self, tfds_set, file_format):
        config = self.config(tfds_set(file_format, {"train": 10}), train_split="train[2:]")
        source = data.open_source(config, "train")
        assert source.describe(2).endswith(f"toy-train.{file_format}-00000-of-00002[4]")
        assert source.describe(3).endswith(f"toy-train.{file_format}-00001-of-00002[0]")

    def test_a_split_without_labels(self, tfds_set, file_format):
        root = tfds_set(file_format, {"train": 4}, label=lambda number: -1)
        with pytest.raises(InputError, match="has no labels"):
            data.num_examples(self.config(root), "train")

    def test_no_tensorflow(self, tfds_set, file_format):
        root = tfds_set(file_format, {"train": 4})
        code = (
            "import sys\n"
            "from tdm_jax import data\n"
            f"config = data.make_config(name='tfds:toy', data_dir={str(root)!r})\n"
            "assert data.open_source(config, 'train')[3]['label'] == 0\n"
            "assert 'tensorflow' not in sys.modules"
        )
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_set_without_images(tmp_path):
    import tensorflow_datasets as tfds

    directory = tmp_path / "words" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "words-train.tfrecord-00000-of-00001").touch()
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=[1], num_bytes=0)],
        check_data=False,
    )
    with pytest.raises(InputError, match="not a set of labelled images; its features are text"):
        data.num_examples(data.make_config(name="tfds:words", data_dir=str(tmp_path)), "train")
