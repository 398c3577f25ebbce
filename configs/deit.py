"""DeiT on ImageNet, as its authors and TDM's train it: what the other `deit_*` files share.

ImageNet comes from TFDS, or from a folder of class folders:

    --config.data.data_dir=/data/tfds                             (imagenet2012, any file format)
    --config.data.name=folder --config.data.data_dir=/data/imagenet   (with train/ and val/)

The reducer is TDM at keep rate 0.7. `--config.reducer.name=none` trains DeiT itself; every other
method goes by its name.
"""

from ml_collections import ConfigDict

from tdm_jax.training.config import default_config


def _imagenet(size: str) -> ConfigDict:
    config = default_config(name="tfds:imagenet2012")
    config.model.name = f"deit_{size}_patch16_224"
    config.model.drop_path = 0.1
    config.model.dtype = "bfloat16"
    config.reducer.name = "tdm"
    config.reducer.keep_rate = 0.7
    config.eval.every_epochs = 5.0
    config.checkpoint.every_epochs = 1.0
    config.log_every = 100
    return config


def from_scratch(size: str) -> ConfigDict:
    """300 epochs from random weights; the keep rate falls from epoch 10 to 110."""
    config = _imagenet(size)
    config.epochs = 300.0
    config.data.batch_size = 2048
    config.data.repeats = 3
    config.optim.ema_decay = 0.99996
    config.keep_warmup.start_epoch = 10.0
    config.keep_warmup.end_epoch = 110.0
    return config


def fine_tune(size: str, checkpoint: str) -> ConfigDict:
    """30 epochs from the weights that DeiT's authors published; no distillation, no warm-up."""
    config = _imagenet(size)
    config.init_from = checkpoint
    config.epochs = 30.0
    config.data.batch_size = 1024
    config.data.repeats = 3
    config.optim.learning_rate = 2e-5
    config.optim.warmup_epochs = 0.0
    config.optim.end_learning_rate = 2e-6
    config.optim.weight_decay = 1e-6
    return config
