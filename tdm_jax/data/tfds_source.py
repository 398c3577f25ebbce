"""Any image classification set that TFDS has prepared, as ArrayRecord or TFRecord, without TensorFlow."""

from pathlib import Path

import grain
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.message import DecodeError

from tdm_jax.data.images import CorruptImage
from tdm_jax.data.sources import VALIDATION_NAMES, Record
from tdm_jax.data.tfrecord import Shard, TFRecordReader
from tdm_jax.errors import InputError, unknown

_SKIP_DECODING = tfds.decode.SkipDecoding()


class TfdsSource:
    """One split of a prepared set; images stay encoded."""

    def __init__(self, info: tfds.core.DatasetInfo, split: str):
        """Opens the split's files and finds the image and the label among the features."""
        self._name, self._split = f"{info.full_name}[{split}]", split
        self._features = info.features
        self._image_key, self._label_key = _keys(info)
        label = info.features[self._label_key]
        self.num_classes = label.num_classes
        self.class_names = tuple(label.names) if label.names else None
        self._records = _records(info, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            example = self._features.deserialize_example_np(
                self._records[index], decoders={self._image_key: _SKIP_DECODING}
            )
        except (DecodeError, KeyError, ValueError) as error:
            raise CorruptImage(f"not an example of this set: {error}") from error
        return {"image": example[self._image_key], "label": int(example[self._label_key])}

    def describe(self, index: int) -> str:
        if isinstance(self._records, TFRecordReader):
            return self._records.describe(index)
        return f"{self._name}[{index}]"


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
        labels = [source[0]["label"]] if len(source) else []
    except (ValueError, OSError) as error:
        raise InputError(f"cannot open {name}[{split}] in {directory}: {error}") from error
    if not labels:
        raise InputError(f"{name}[{split}] in {directory} is empty")
    if not 0 <= labels[0] < source.num_classes:
        raise InputError(
            f"{name}[{split}] has no labels (its first is {labels[0]}); choose another split"
        )
    return source


def find_prepared(name: str, data_dir: Path) -> Path:
    """The directory with `dataset_info.json` of a set's newest, or named, version.

    Raises:
      InputError: there is none.
    """
    dataset, _, version = name.partition(":")
    found = [path.parent for path in data_dir.glob(f"{dataset}/{version or '*'}/dataset_info.json")]
    found = [path for path in found if tfds.core.Version.is_valid(path.name)]
    if found:
        return max(found, key=lambda path: tfds.core.Version(path.name))
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
    info: tfds.core.DatasetInfo, split: str
) -> TFRecordReader | grain.sources.ArrayRecordDataSource:
    """Random access to serialised examples, in either file format."""
    instructions = info.splits[split].file_instructions
    if info.file_format == tfds.core.FileFormat.TFRECORD:
        logging.info("reading %s[%s] from TFRecord files", info.name, split)
        return TFRecordReader(
            [Shard(Path(f.filename), f.skip, f.take, f.examples_in_shard)
             for f in instructions]
        )  # fmt: skip
    if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return grain.sources.ArrayRecordDataSource(instructions)
    raise InputError(
        f"{info.name} is stored as {info.file_format.value}; expected tfrecord or array_record"
    )
