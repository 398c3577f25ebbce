"""Any labelled image set that TFDS has prepared, ArrayRecord or TFRecord, without TensorFlow."""

import os
from collections.abc import Sequence
from pathlib import Path

import grain
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.utils.shard_utils import FileInstruction

from tdm_jax.data.images import CorruptImage
from tdm_jax.data.source import VALIDATION_NAMES, Record
from tdm_jax.data.tfrecord import Shard, TFRecordReader
from tdm_jax.errors import InputError, unknown

_SKIP_DECODING = tfds.decode.SkipDecoding()


class TfdsSource:
    """One split of a prepared set; images stay encoded."""

    def __init__(self, info: tfds.core.DatasetInfo, split: str):
        """Opens the split's files and finds the image and the label among the features."""
        self._features = info.features
        self._image_key, self._label_key = _keys(info)
        label = info.features[self._label_key]
        self.num_classes = label.num_classes
        self.class_names = tuple(label.names) if label.names else None
        self._files = info.splits[split].file_instructions
        self._records = _records(info, self._files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
        except RuntimeError as error:  # ArrayRecord's, for damaged files
            raise CorruptImage(str(error)) from error
        try:
            example = self._features.deserialize_example_np(
                record, decoders={self._image_key: _SKIP_DECODING}
            )
        except (DecodeError, KeyError, ValueError) as error:
            raise CorruptImage(f"not an example of this set: {error}") from error
        return {"image": example[self._image_key], "label": int(example[self._label_key])}

    def describe(self, index: int) -> str:
        """Its file and the record's number in it."""
        for file in self._files:
            if index < file.take:
                return f"{file.filename}[{file.skip + index}]"
            index -= file.take
        raise IndexError(index)


def open_tfds(name: str, data_dir: str, split: str) -> TfdsSource:
    """Opens a set by name, from what lies on disk: nothing is downloaded or prepared.

    Args:
      name: "imagenet2012", "imagenet2012_subset/10pct", "mnist:3.0.1".
      data_dir: TFDS's data directory.
      split: a split or a slice of one ("train[:90%]"); empty takes the validation split.

    Raises:
      InputError: the set, the split, or its files are missing, or it is not one of labelled images.
    """
    directory = find_prepared(name, Path(data_dir).expanduser())
    info = tfds.builder_from_directory(directory).info
    split = split or next((s for s in VALIDATION_NAMES if s in info.splits), "validation")
    base = split.partition("[")[0].partition("+")[0]
    if base not in info.splits:
        raise unknown(f"split of {name}", split, info.splits)
    try:
        source = TfdsSource(info, split)
        label = source[0]["label"] if len(source) else None
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read {name}, split {split}, in {directory}: {error}") from error
    if label is None:
        raise InputError(f"{name}, split {split}, in {directory} is empty")
    if not 0 <= label < source.num_classes:
        raise InputError(f"{name}, split {split}, has no labels (the first is {label})")
    return source


def find_prepared(name: str, data_dir: Path) -> Path:
    """The directory with `dataset_info.json` of a set's newest, or named, version.

    Raises:
      InputError: there is none.
    """
    dataset, _, version = name.partition(":")
    metadata = data_dir.glob(f"{dataset}/{version or '*'}/dataset_info.json")
    versions = [path.parent for path in metadata if tfds.core.Version.is_valid(path.parent.name)]
    if versions:
        return max(versions, key=lambda path: tfds.core.Version(path.name))
    configs = sorted({path.parent.parent.name for path in
                      data_dir.glob(f"{dataset}/*/*/dataset_info.json")})  # fmt: skip
    if configs:
        raise InputError(
            f"tfds:{dataset} has several configs in {data_dir}: {', '.join(configs)}; "
            f"name one, as in tfds:{dataset}/{configs[0]}"
        )
    raise InputError(
        f"no prepared {name} in {data_dir}: expected {dataset}/{version or '<version>'}/"
        "dataset_info.json there (prepare it first with tfds build, or set data_dir)"
    )


def _keys(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Names of the image and of the label among the features."""
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    supervised = info.supervised_keys or ()
    image = next((k for k in supervised if k in images), images[0] if len(images) == 1 else None)
    label = next((k for k in supervised if k in labels), None)
    label = label or ("label" if "label" in labels else labels[0] if len(labels) == 1 else None)
    if image is None or label is None:
        raise InputError(
            f"{info.name} is not a set of labelled images; its features are {', '.join(features)}"
        )
    return image, label


def _records(
    info: tfds.core.DatasetInfo, files: Sequence[FileInstruction]
) -> TFRecordReader | grain.sources.ArrayRecordDataSource:
    """Random access to serialised examples, in either file format."""
    missing = [file.filename for file in files if not os.path.exists(file.filename)]
    if missing:
        raise InputError(f"{len(missing)} of {len(files)} files are missing, first {missing[0]}")
    if info.file_format == tfds.core.FileFormat.TFRECORD:
        return TFRecordReader(
            [Shard(Path(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]
        )
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return grain.sources.ArrayRecordDataSource(files)
    raise InputError(
        f"{info.name} is stored as {info.file_format.value}; expected tfrecord or array_record"
    )
