"""Small data sets, made by the tests: JPEG folders, and TFDS sets in both file formats."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def numbered(number: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """A picture that is recognised by its colour: red and green spell the number."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number // 16 * 16, number % 16 * 16, 128
    return pixels


def number_of(image: np.ndarray) -> int:
    """Inverse of `numbered`, from any part of the picture."""
    red, green = (float(channel) for channel in image[..., :2].mean((0, 1)))
    return round(red / 16) * 16 + round(green / 16)


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


_CRC_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ 0x82F63B78 if _byte & 1 else _byte >> 1
    _CRC_TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    with path.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))


def write_array_record(path: Path, records: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(image: bytes, label: int, name: str) -> bytes:
    """A serialised tf.train.Example, as TFDS stores one."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    feature = message.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["label"].int64_list.value.append(label)
    feature["file_name"].bytes_list.value.append(name.encode())
    return message.SerializeToString()


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
