"""What to read, how to augment and how to normalise: one frozen dataclass, checked when made."""

import dataclasses
import difflib
from collections.abc import Mapping

from ml_collections import ConfigDict

from tdm_jax.data import randaugment
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS
from tdm_jax.parsing import parse

EMBEDDED = ("digits", "cluttered_digits")
NAMES = (*EMBEDDED, "folder", "photos")
AUGMENTATIONS = ("crop", "affine", "none")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """One data set with its transforms; `make_config` makes it, with each source's defaults.

    Attributes:
      name: "digits" or "cluttered_digits" (embedded), "folder" (class folders under `data_dir`),
        "photos" (all images below `data_dir`, or in a list, without classes: not to train on), or
        "tfds:<name>", where `<name>` may carry a builder config and a version:
        "tfds:imagenet2012_subset/10pct:5.0.0".
      data_dir: root of the folder, on a disk or in an object store (gs://...); for photos also a
        text file with a path on each line; or TFDS's data_dir. Unused for what is embedded.
      train_split, validation_split: name in TFDS (slices such as "train[:90%]" too) or folder name.
        An empty validation_split takes the first there is of validation, val and test.
      holdout: for a folder without train and validation folders, the share of each class that is
        held out for validation.
      image_size: (height, width) of a batch's images. One integer stands for a square.
      channels: 3 (RGB) or 1 (grey); every image is converted.
      mean, std: per channel, of images scaled to [0, 1]; normalising is the device's work.
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

    @property
    def unlabelled(self) -> bool:
        """Whether the images have no classes."""
        return self.name == "photos"

    def __post_init__(self) -> None:
        kind, _, dataset = self.name.partition(":")
        if self.name not in NAMES and not (kind == "tfds" and dataset):
            near = difflib.get_close_matches(self.name, NAMES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"unknown data.name {self.name!r}; {hint}expected {', '.join(NAMES)} or tfds:<name>"
            )
        for holds, expected, keys in _RANGES:
            for key in keys:
                _require(holds(getattr(self, key)), self, key, expected)
        for key in ("mean", "std"):
            fits = len(getattr(self, key)) == self.channels
            _require(fits, self, key, f"{self.channels} numbers, one a channel")
        # Closer together, an image would be mixed with itself.
        fits = self.repeats == 1 or self.batch_size >= 2 * self.repeats
        _require(fits, self, "repeats", f"at most half of batch_size={self.batch_size}")
        if self.augmentation not in AUGMENTATIONS:
            raise unknown("data.augmentation", self.augmentation, AUGMENTATIONS)
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("data.interpolation", self.interpolation, INTERPOLATIONS)
        if self.rand_augment:
            randaugment.parse(self.rand_augment)


_RANGES = (
    (lambda v: min(v) > 0, "(height, width), both positive", ("image_size",)),
    (lambda v: v in (1, 3), "1 or 3", ("channels",)),
    (lambda v: min(v, default=0) > 0, "positive numbers", ("std",)),
    (lambda v: v > 0, "a positive integer", ("batch_size", "repeats")),
    (lambda v: v >= 0, "zero or more", ("eval_batch_size", "threads", "workers", "max_corrupt")),
    (lambda v: v >= 0, "zero or more", ("mixup", "cutmix", "color_jitter")),
    (lambda v: 0 <= v < 2**32, "an integer in [0, 2**32)", ("seed",)),
    (lambda v: 0 <= v <= 1, "in [0, 1]", ("flip", "erasing", "mix_prob", "mix_switch")),
    (lambda v: 0 <= v < 1, "in [0, 1)", ("label_smoothing", "affine_shift", "affine_scale")),
    (lambda v: 0 < v < 1, "a share in (0, 1)", ("holdout",)),
    (lambda v: 0 < v <= 1, "a share in (0, 1]", ("crop_pct",)),
    (lambda v: 0 < v[0] <= v[1] <= 1, "(low, high) within (0, 1]", ("crop_scale",)),
    (lambda v: 0 < v[0] <= v[1], "(low, high), both positive", ("crop_ratio",)),
)  # fmt: skip


def _require(holds: bool, config: DataConfig, key: str, expected: str) -> None:
    if not holds:
        raise InputError(f"data.{key}: got {getattr(config, key)!r}, expected {expected}")


# Whatever is not said of the embedded digits: small and grey, shifted a little, never cut or mixed.
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
# Nearly every image is new, and a network of four-pixel patches sees whole patches move.
_CLUTTERED_DIGITS = {
    **_DIGITS,
    "image_size": (32, 32),
    "mean": (0.088,),
    "std": (0.225,),
    "augmentation": "none",
    "label_smoothing": 0.0,
}
_PHOTOS = {"channels": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def make_config(
    values: Mapping[str, object] | ConfigDict | None = None, **overrides: object
) -> DataConfig:
    """A checked `DataConfig` from a mapping, keywords, or both.

    What is not given, or None, has the default of its source: DeiT's recipe at 224 pixels for a
    folder and for TFDS, 28 grey pixels with small shifts for the digits, 32 as they are for the
    cluttered ones. A `mean` or `std` of one number stands for all channels, an `image_size` of one
    for both sides. `dataclasses.asdict` turns the result back into a mapping with every key, as a
    config file wants it.

    Raises:
      InputError: an unknown key, a value of another type, or one out of range.
    """
    settings = {k: v for k, v in {**dict(values or {}), **overrides}.items() if v is not None}
    match settings.get("image_size"):
        # `--config.data.image_size=112` is a list of one.
        case int(side) | [int(side)]:
            settings["image_size"] = (side, side)
    embedded = {"digits": _DIGITS, "cluttered_digits": _CLUTTERED_DIGITS}
    defaults = embedded.get(str(settings.get("name")), _PHOTOS)
    channels = settings.get("channels", defaults["channels"])
    for key in ("mean", "std"):
        numbers = settings.get(key, defaults[key])
        if key not in settings and channels == 1:
            numbers = (sum(numbers) / len(numbers),)  # of colours, seen in grey
        if isinstance(numbers, tuple | list) and len(numbers) == 1 and channels == 3:
            numbers = tuple(numbers) * 3
        settings[key] = numbers
    return parse(DataConfig, {**defaults, **settings}, "data.")
