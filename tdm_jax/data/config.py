"""What to read, how to augment and how to normalise: one frozen dataclass, checked when made."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping

from ml_collections import ConfigDict

from tdm_jax import errors
from tdm_jax.data import randaugment
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS

AUGMENTATIONS = ("crop", "affine", "none")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One data set with its transforms; `make_config` makes it, with each source's defaults.

    Attributes:
      name: "digits" (embedded), "folder" (class folders under `data_dir`), or "tfds:<name>", where
        `<name>` may carry a builder config and a version: "tfds:imagenet2012_subset/10pct:5.0.0".
      data_dir: root of the folder, or TFDS's data_dir. Unused for digits.
      train_split, validation_split: name in TFDS (slices such as "train[:90%]" too) or folder name.
        An empty validation_split takes the first there is of validation, val and test.
      holdout: for a folder without train and validation folders, the share of each class that is
        held out for validation.
      image_size: (height, width) of a batch's images. One integer stands for a square.
      channels: 3 (RGB) or 1 (grey); every image is converted.
      mean, std: per channel, of images scaled to [0, 1]; for the device (`tdm_jax.data.device_transforms`).
      batch_size: global training batch, over all devices and hosts.
      eval_batch_size: global evaluation batch; 0 takes batch_size.
      seed: of the shuffle and of every random draw on the host, in [0, 2**32).
      repeats: how many differently augmented copies of an image share a batch.
      augmentation: "crop" (random resized crop, flip, RandAugment or colour jitter), "affine"
        (small shift, scale and rotation) or "none" (the evaluation transform).
      crop_scale, crop_ratio: area share and aspect ratio of the random resized crop.
      flip: probability of a horizontal flip.
      color_jitter: range of brightness, contrast and saturation, 1 ± this; off with rand_augment.
      rand_augment: timm's notation, for example "rand-m9-mstd0.5-inc1"; empty is off.
      affine_shift, affine_scale, affine_degrees: largest shift (share of the size), scale change
        and rotation of the "affine" augmentation.
      crop_pct: evaluation resizes to image_size / crop_pct, then crops the centre.
      interpolation: one of `INTERPOLATIONS`; downscaling is always antialiased.
      erasing: probability that an image has a random box replaced by N(0, 1) noise (on the device).
      mixup, cutmix: the alpha of each one's Beta(alpha, alpha); 0 is off (on the device).
      mix_prob: share of batches that are mixed at all.
      mix_switch: share of the mixed batches that take cutmix, where both are on.
      label_smoothing: share of the target spread over all classes.
      threads: decoding threads per process (of each worker, if there are any); 0: one a CPU core.
      workers: worker processes; 0 decodes in threads of this one, which suits up to some ten cores.
      max_corrupt: how many different unreadable images are skipped before reading stops.
    """

    name: str
    data_dir: str = ""
    train_split: str = "train"
    validation_split: str = ""
    holdout: float = 0.2
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    batch_size: int = 1024
    eval_batch_size: int = 0
    seed: int = 0
    repeats: int = 1
    augmentation: str = "crop"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.3
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    affine_shift: float = 0.08
    affine_scale: float = 0.1
    affine_degrees: float = 10.0
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.1
    threads: int = 0
    workers: int = 0
    max_corrupt: int = 100

    def __post_init__(self) -> None:
        _check(self)


# The embedded digits are small and grey: shifted a little, never cut out or mixed.
_DIGITS = {
    "image_size": (28, 28),
    "channels": 1,
    "mean": (0.309,),
    "std": (0.349,),
    "batch_size": 32,
    "augmentation": "affine",
    "crop_pct": 1.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}


def make_config(
    values: Mapping[str, object] | ConfigDict | None = None, **overrides: object
) -> DataConfig:
    """A checked `DataConfig` from a mapping, keywords, or both.

    Whatever is not given has the default of its source: DeiT's recipe at 224 pixels for a folder
    and for TFDS, 28 grey pixels with small shifts for the digits. `dataclasses.asdict` turns the
    result back into a mapping with every key, as a config file wants it.

    Raises:
      InputError: an unknown key, a value of another type, or one out of range.
    """
    given = {**dict(values or {}), **overrides}
    fields = {field.name: field.type for field in dataclasses.fields(DataConfig)}
    for key in given:
        if key not in fields:
            raise errors.unknown("data setting", key, fields)
    if "name" not in given:
        raise InputError("data.name is missing; expected digits, folder or tfds:<name>")
    cast = {key: _cast(key, value, fields[key]) for key, value in given.items()}
    defaults = _DIGITS if cast["name"] == "digits" else {}
    return DataConfig(**{**defaults, **cast})


def _cast(key: str, value: object, kind: object) -> object:
    """`value` as the type of field `key`: integers pass for floats, lists for tuples."""
    if key == "image_size" and _is(value, int):
        return (value, value)
    if kind is float and _is(value, int):
        return float(value)
    if kind in (int, float, str):
        if not _is(value, kind):
            raise _wrong(key, value, {int: "an integer", float: "a number", str: "a string"}[kind])
        return value
    number, length = typing.get_args(kind)
    if not isinstance(value, tuple | list) or (length is not ... and len(value) != 2):
        raise _wrong(key, value, "numbers, one a channel" if length is ... else "a pair of numbers")
    return tuple(_cast(f"{key}[{i}]", item, number) for i, item in enumerate(value))


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _wrong(key: str, got: object, expected: str) -> InputError:
    return InputError(f"data.{key}: got {got!r}, expected {expected}")


def _check(config: DataConfig) -> None:
    """Every range, in one place; the first that fails is reported."""
    _check_source(config)

    def require(condition: bool, key: str, expected: str) -> None:
        if not condition:
            raise _wrong(key, getattr(config, key), expected)

    require(min(config.image_size) > 0, "image_size", "(height, width), both positive")
    require(config.channels in (1, 3), "channels", "1 or 3")
    for key in ("mean", "std"):
        length = len(getattr(config, key))
        require(length == config.channels, key, f"{config.channels} numbers, one a channel")
    require(min(config.std) > 0, "std", "positive numbers")
    for key in ("batch_size", "repeats"):
        require(getattr(config, key) > 0, key, "a positive integer")
    # Closer together, an image would be mixed with itself.
    fits = config.repeats == 1 or config.batch_size >= 2 * config.repeats
    require(fits, "repeats", f"at most half of batch_size={config.batch_size}")
    for key in (
        "eval_batch_size",
        "threads",
        "workers",
        "max_corrupt",
        "mixup",
        "cutmix",
        "color_jitter",
    ):
        require(getattr(config, key) >= 0, key, "zero or more")
    require(0 <= config.seed < 2**32, "seed", "an integer in [0, 2**32)")
    for key in ("flip", "erasing", "mix_prob", "mix_switch"):
        require(0 <= getattr(config, key) <= 1, key, "a probability in [0, 1]")
    for key in ("label_smoothing", "affine_shift", "affine_scale"):
        require(0 <= getattr(config, key) < 1, key, "a number in [0, 1)")
    require(0 < config.holdout < 1, "holdout", "a share in (0, 1)")
    require(0 < config.crop_pct <= 1, "crop_pct", "a share in (0, 1]")
    require(_is_range(config.crop_scale, 1.0), "crop_scale", "(low, high) within (0, 1]")
    require(_is_range(config.crop_ratio, float("inf")), "crop_ratio", "(low, high), both positive")
    if config.augmentation not in AUGMENTATIONS:
        raise errors.unknown("data.augmentation", config.augmentation, AUGMENTATIONS)
    if config.interpolation not in INTERPOLATIONS:
        raise errors.unknown("data.interpolation", config.interpolation, INTERPOLATIONS)
    if config.rand_augment:
        randaugment.parse(config.rand_augment)


def _check_source(config: DataConfig) -> None:
    kind, _, dataset = config.name.partition(":")
    if config.name not in ("digits", "folder") and not (kind == "tfds" and dataset):
        near = difflib.get_close_matches(config.name, ["digits", "folder"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"unknown data.name {config.name!r}; {hint}expected digits, folder or tfds:<name>"
        )
    if config.name != "digits" and not config.data_dir:
        raise InputError(f"data.data_dir is empty; data.name={config.name!r} needs a directory")


def _is_range(pair: tuple[float, float], limit: float) -> bool:
    return 0 < pair[0] <= pair[1] <= limit
