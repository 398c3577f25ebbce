"""Small data sets, made by the tests: folders of pictures, and TFDS sets in both file formats."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.files import encode, example, numbered, write_array_record, write_tfrecord


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes `<split>/<class>/<n>.png` of numbered pictures; numbers run through all classes."""

    def make(counts: dict[str, list[int]], damaged: tuple[int, ...] = ()) -> Path:
        root = tmp_path / "images"
        for split, sizes in counts.items():
            number = 0
            for label, size in enumerate(sizes):
                directory = root / split / f"class_{label}"
                directory.mkdir(parents=True)
                for _ in range(size):
                    data = encode(numbered(number))
                    if number in damaged:
                        data = data[: len(data) // 2]
                    (directory / f"{number:03d}.png").write_bytes(data)
                    number += 1
        return root

    return make


@pytest.fixture
def tfds_set(tmp_path: Path) -> Callable[..., Path]:
    """Prepares numbered pictures as TFDS lays a set out: two files a split, and its metadata."""

    def make(
        file_format: str,
        splits: dict[str, int],
        name: str = "toy",
        version: str = "1.0.0",
        damaged: tuple[int, ...] = (),
        label: Callable[[int], int] = lambda number: number % 3,
    ) -> Path:
        import tensorflow_datasets as tfds

        directory = tmp_path / "tfds" / name / version
        directory.mkdir(parents=True)
        write = {"tfrecord": write_tfrecord, "array_record": write_array_record}[file_format]
        infos = []
        for split, count in splits.items():
            records = []
            for number in range(count):
                image = encode(numbered(number))
                image = image[:40] if number in damaged else image
                records.append(example(image, label(number), f"{number}.png"))
            half = count // 2
            set_name = Path(name).parts[0]
            for shard, part in enumerate((records[:half], records[half:])):
                write(directory / f"{set_name}-{split}.{file_format}-{shard:05d}-of-00002", part)
            infos.append(
                tfds.core.SplitInfo(name=split, shard_lengths=[half, count - half], num_bytes=0)
            )
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
                "file_name": tfds.features.Text(),
            }
        )
        tfds.folder_dataset.write_metadata(
            data_dir=directory,
            features=features,
            split_infos=infos,
            filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            supervised_keys=("image", "label"),
            check_data=False,
        )
        return tmp_path / "tfds"

    return make
