"""Data: sources, host transforms, and batches that depend on the step alone.

Batches come in a loop:

    config = data.make_config(name="folder", data_dir="photos", image_size=224, batch_size=256)
    for batch in data.train_batches(config, start_step=0):
        batch["image"]  # uint8 [256, 224, 224, 3], not yet normalised: see device_transforms
        batch["label"]  # int32 [256]
"""

from tdm_jax.data.config import DataConfig, make_config
from tdm_jax.data.pipeline import (
    Batches,
    class_names,
    eval_batches,
    num_classes,
    num_examples,
    train_batches,
)
from tdm_jax.data.sources import open_source

__all__ = [
    "Batches",
    "DataConfig",
    "class_names",
    "eval_batches",
    "make_config",
    "num_classes",
    "num_examples",
    "open_source",
    "train_batches",
]
