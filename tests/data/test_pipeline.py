import collections
import itertools

import numpy as np
import pytest
from absl import flags

from tdm_jax import data
from tdm_jax.data import pipeline
from tdm_jax.errors import InputError
from tests.data.files import number_of


def digits(**values):
    return data.make_config(**{"name": "digits", "batch_size": 12, "threads": 2, **values})


@pytest.fixture
def parsed_flags():
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not was_parsed:
        flags.FLAGS.unparse_flags()


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def over_hosts(make, hosts, count):
    """The global batches that `hosts` processes make together."""
    parts = [take(make(process_index=i, process_count=hosts), count) for i in range(hosts)]
    return [{key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
            for batches in zip(*parts, strict=True)]  # fmt: skip


def png_folder(root, **values):
    values = {"image_size": 16, "batch_size": 4, "augmentation": "none", "threads": 2, **values}
    return data.make_config(name="folder", data_dir=str(root), **values)


def numbers(batches):
    return [number_of(image) for batch in batches for image in batch["image"]]


class TestTraining:
    def test_batches(self):
        (batch,) = take(data.train_batches(digits()), 1)
        assert (batch["image"].shape, batch["image"].dtype) == ((12, 28, 28, 1), np.uint8)
        assert (batch["label"].shape, batch["label"].dtype) == ((12,), np.int32)
        assert batch.keys() == {"image", "label"}

    @pytest.mark.parametrize("threads", [1, 5])
    def test_any_number_of_threads(self, threads):
        expected = take(data.train_batches(digits()), 6)
        assert_same(take(data.train_batches(digits(threads=threads)), 6), expected)

    @pytest.mark.parametrize("hosts", [2, 3, 12])
    def test_any_number_of_hosts(self, hosts):
        def make(**share):
            return data.train_batches(digits(repeats=3), **share)

        assert_same(over_hosts(make, hosts, 4), take(make(), 4))

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [1, 2])
    def test_any_number_of_workers(self, workers, parsed_flags):
        expected = take(data.train_batches(digits(batch_size=48), start_step=3), 5)
        batches = data.train_batches(digits(batch_size=48, workers=workers), start_step=3)
        assert_same(take(batches, 5), expected)

    @pytest.mark.parametrize("step", [1, 7, 150])
    def test_seeking_is_the_same_as_walking(self, step):
        # 119 whole batches are an epoch: step 150 lies in the second.
        walked = list(itertools.islice(data.train_batches(digits()), step, step + 2))
        assert_same(take(data.train_batches(digits(), start_step=step), 2), walked)

    def test_seeds_differ_and_steps_differ(self):
        first, second = take(data.train_batches(digits()), 2)
        (other,) = take(data.train_batches(digits(seed=1)), 1)
        assert (first["label"] != other["label"]).any()
        assert (first["image"] != second["image"]).any()

    def test_every_epoch_shows_every_example_in_another_order(self, folder):
        config = png_folder(folder({"train": [5, 7], "val": [1, 1]}), batch_size=3)
        shown = numbers(take(data.train_batches(config), 12))
        epochs = [shown[i : i + 12] for i in range(0, 36, 12)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_labels_follow_their_images(self, folder):
        config = png_folder(folder({"train": [5, 7], "val": [1, 1]}))
        for batch in take(data.train_batches(config), 9):
            assert [int(n >= 5) for n in numbers([batch])] == batch["label"].tolist()

    def test_an_example_is_augmented_anew_in_every_epoch(self, folder):
        root = folder({"train": [1], "val": [1]})
        config = png_folder(root, augmentation="affine", batch_size=1)
        images = [batch["image"].tobytes() for batch in take(data.train_batches(config), 8)]
        assert len(set(images)) == 8

    def test_a_batch_may_exceed_the_data(self, folder):
        config = png_folder(folder({"train": [3], "val": [1]}), batch_size=8)
        counts = collections.Counter(numbers(take(data.train_batches(config), 3)))
        assert counts == {0: 8, 1: 8, 2: 8}

    def test_workers_ask_for_parsed_flags(self, parsed_flags):
        flags.FLAGS.unparse_flags()
        with pytest.raises(InputError, match="needs absl's flags parsed"):
            data.train_batches(digits(workers=1))

    def test_batches_that_do_not_divide(self):
        with pytest.raises(InputError, match="batch size 12 does not divide over 5 processes"):
            data.train_batches(digits(), process_count=5)
        with pytest.raises(InputError, match="process_index 2 of 2"):
            data.train_batches(digits(), process_index=2, process_count=2)


class TestRepeats:
    @pytest.mark.parametrize(("repeats", "batch"), [(3, 12), (2, 6), (3, 8), (4, 3)])
    def test_every_image_comes_so_often(self, repeats, batch):
        spacing = max(1, batch // repeats)
        rows = range(repeats * spacing * 10)
        images = [pipeline.repeated(row, repeats=repeats, spacing=spacing) for row in rows]
        counts = collections.Counter(images)
        assert set(counts) == set(range(spacing * 10))
        assert set(counts.values()) == {repeats}

    def test_copies_share_a_batch_and_no_pair(self, folder):
        root = folder({"train": [60], "val": [1]})
        config = png_folder(root, batch_size=12, repeats=3)
        for batch in take(data.train_batches(config), 5):
            shown = numbers([batch])
            assert set(collections.Counter(shown).values()) == {3}
            assert all(a != b for a, b in zip(shown[::2], shown[1::2], strict=True))

    def test_copies_are_augmented_differently(self):
        batch = take(data.train_batches(digits(repeats=3)), 1)[0]
        assert batch["label"][:4].tolist() == batch["label"][4:8].tolist()
        assert (batch["image"][:4] != batch["image"][4:8]).any((1, 2, 3)).all()

    def test_an_epoch_of_all_copies_shows_every_image(self, folder):
        config = png_folder(folder({"train": [8], "val": [1]}), batch_size=4, repeats=2)
        counts = collections.Counter(numbers(take(data.train_batches(config), 4)))
        assert counts == dict.fromkeys(range(8), 2)


class TestEvaluation:
    @pytest.mark.parametrize("batch_size", [1, 7, 13, 40])
    def test_every_example_once_and_in_order(self, folder, batch_size):
        config = png_folder(folder({"train": [1, 1], "val": [6, 7]}), eval_batch_size=batch_size)
        batches = list(data.eval_batches(config))
        assert len(batches) == -(-13 // batch_size)
        assert all(batch["image"].shape[0] == batch_size for batch in batches)
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < 13)
        assert np.array(numbers(batches))[mask > 0].tolist() == list(range(13))
        labels = np.concatenate([batch["label"] for batch in batches])
        assert labels[mask > 0].tolist() == [0] * 6 + [1] * 7

    @pytest.mark.parametrize("hosts", [2, 4])
    def test_any_number_of_hosts(self, hosts):
        config = digits(eval_batch_size=64)

        def make(**share):
            return data.eval_batches(config, **share)

        assert_same(over_hosts(make, hosts, 10), list(make()))

    def test_the_training_split_unaugmented(self):
        config = digits(eval_batch_size=500)
        batches = list(data.eval_batches(config, "train"))
        assert sum(batch["mask"].sum() for batch in batches) == 1437
        assert_same(list(data.eval_batches(config, "train")), batches)

    def test_uses_the_training_batch_by_default(self):
        assert next(data.eval_batches(digits()))["image"].shape[0] == 12


class TestCorruptImages:
    def test_the_next_image_takes_the_place(self, folder):
        root = folder({"train": [5, 7], "val": [1, 1]}, damaged=(4, 8, 9))
        config = png_folder(root)
        batches = data.train_batches(config)
        shown = collections.Counter(numbers(itertools.islice(batches, 3)))
        # 4 becomes 5, with 5's label; 8 and 9 become 10.
        assert shown == {0: 1, 1: 1, 2: 1, 3: 1, 5: 2, 6: 1, 7: 1, 10: 3, 11: 1}
        assert sorted(path.rsplit("/", 1)[1] for path in batches.corrupt) == [
            "004.png", "008.png", "009.png",
        ]  # fmt: skip
        batches.close()
        for batch in take(data.train_batches(config), 9):
            assert [int(n >= 5) for n in numbers([batch])] == batch["label"].tolist()

    def test_the_last_image_is_followed_by_the_first(self, folder):
        config = png_folder(folder({"train": [4], "val": [1]}, damaged=(3,)))
        shown = numbers(take(data.train_batches(config), 1))
        assert sorted(shown) == [0, 0, 1, 2]

    def test_still_a_function_of_the_step(self, folder):
        root = folder({"train": [24], "val": [1]}, damaged=(3, 4, 17))
        config = png_folder(root, augmentation="affine")
        walked = list(itertools.islice(data.train_batches(config), 8))
        assert_same(take(data.train_batches(config, start_step=5), 3), walked[5:])
        assert_same(take(data.train_batches(png_folder(root, augmentation="affine", threads=1)), 8),
                    walked)  # fmt: skip

    def test_each_is_reported_once(self, folder, caplog):
        config = png_folder(folder({"train": [4], "val": [1]}, damaged=(2,)))
        take(data.train_batches(config), 6)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("unreadable image ")
        assert line.endswith("class_0/002.png (1 so far, at most 100)")

    def test_too_many_stop_and_are_named(self, folder):
        config = png_folder(folder({"train": [12], "val": [1]}, damaged=(1, 5, 7)), max_corrupt=2)
        batches = data.train_batches(config)
        with pytest.raises(InputError) as caught:
            take(batches, 3)
        message = str(caught.value)
        assert message.startswith("3 unreadable images, more than data.max_corrupt=2: ")
        assert all(f"00{number}.png" in message for number in (1, 5, 7))
        assert "\n" not in message

    def test_nothing_readable(self, folder):
        root = folder({"train": [4], "val": [1]}, damaged=(0, 1, 2, 3))
        with pytest.raises(InputError, match="2 unreadable images"):
            next(data.train_batches(png_folder(root, batch_size=1, max_corrupt=1)))

    def test_no_more_allowed_than_there_are(self, folder):
        config = png_folder(folder({"train": [2], "val": [1]}, damaged=(0, 1)))
        with pytest.raises(InputError, match="not one of the 2 images can be read"):
            next(data.train_batches(config))

    def test_a_file_that_vanishes_is_unreadable(self, folder):
        root = folder({"train": [4], "val": [1]})
        config = png_folder(root)
        assert data.num_examples(config, "train") == 4
        (root / "train" / "class_0" / "001.png").unlink()
        assert sorted(numbers(take(data.train_batches(config), 1))) == [0, 2, 2, 3]

    def test_evaluation_masks_them_out(self, folder):
        config = png_folder(folder({"train": [1], "val": [6]}, damaged=(0, 2, 5)))
        batches = data.eval_batches(config)
        masks = [batch["mask"].tolist() for batch in batches]
        assert masks == [[0, 1, 0, 1], [1, 0, 0, 0]]
        assert [path.rsplit("/", 1)[1] for path in batches.corrupt] == [
            "000.png", "002.png", "005.png",
        ]  # fmt: skip

    def test_evaluation_stops_too(self, folder):
        config = png_folder(folder({"train": [1], "val": [6]}, damaged=(0, 2, 5)), max_corrupt=2)
        with pytest.raises(InputError, match="3 unreadable images"):
            list(data.eval_batches(config))

    @pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
    def test_in_tfds(self, tfds_set, file_format):
        root = tfds_set(file_format, {"train": 8}, damaged=(6,))
        config = data.make_config(
            name="tfds:toy", data_dir=str(root), image_size=16, batch_size=8, augmentation="none"
        )
        batches = data.train_batches(config)
        assert sorted(numbers([next(batches)])) == [0, 1, 2, 3, 4, 5, 7, 7]
        (place,) = batches.corrupt
        assert place.endswith(f"toy-train.{file_format}-00001-of-00002[2]")
        batches.close()


def test_a_damaged_record_of_a_tfrecord_file(tfds_set):
    root = tfds_set("tfrecord", {"train": 8})
    path = root / "toy" / "1.0.0" / "toy-train.tfrecord-00000-of-00002"
    content = bytearray(path.read_bytes())
    content[12:40] = bytes(28)
    path.write_bytes(bytes(content))
    config = data.make_config(
        name="tfds:toy", data_dir=str(root), image_size=16, batch_size=8, augmentation="none",
        train_split="train[:4]", validation_split="train[1:]",
    )  # fmt: skip
    with pytest.raises(InputError, match="cannot read toy"):
        data.num_examples(config, "train")
    assert data.num_examples(config, "validation") == 7
