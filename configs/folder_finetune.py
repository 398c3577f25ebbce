"""Any backbone on any folder of class folders, with any method: a short training from its weights.

    python -m tdm_jax.train --config=configs/folder_finetune.py --workdir=runs/photos \
        --config.init_from=dinov2_small --config.data.data_dir=photos --config.reducer.name=tdm

`init_from` is a checkpoint of any kind; its head is replaced by one for the folder's classes. Of
what `tdm_jax.probe` wrote keep the head: `--config.reset_head=False`. Images are prepared with
ImageNet's mean and std, unless `--config.data.mean` and `.std` say otherwise.

Hardware: a GPU, or for a few thousand images of 112 pixels (`--config.data.image_size=112`) a CPU.
Time: with a ViT-S at 112 pixels four seconds a step of 64 on two cores, two at half the cost.
Top-1: the folder's own; what DINOv2-S comes to, method by method, is in docs/results.md.
"""

from ml_collections import ConfigDict

from tdm_jax.training.config import default_config


def get_config() -> ConfigDict:
    config = default_config(name="folder", data_dir="photos")
    config.model.name = "init_from"
    config.init_from = "checkpoint"
    config.reset_head = True
    config.epochs = 5.0
    config.data.batch_size = 64
    # What the network knows of places and colours is kept: photos are cropped a little and flipped.
    config.data.crop_scale = (0.5, 1.0)
    config.data.rand_augment = ""
    config.data.erasing = 0.0
    config.data.mixup = 0.0
    config.data.cutmix = 0.0
    config.optim.learning_rate = 3e-5 * 512 / 64  # 3e-5 at the batch of 64
    config.optim.end_learning_rate = 1e-6
    config.optim.warmup_epochs = 0.5
    config.optim.weight_decay = 0.05
    config.eval.every_epochs = 1.0
    config.checkpoint.every_epochs = 1.0
    return config
