"""ToCom's maps for a checkpoint, by distillation from itself over random pairs of merges.

    python -m tdm_jax.train --config=configs/tocom.py --workdir=runs/tocom \
        --config.init_from=classifier --config.data.data_dir=photos

At every step two numbers of merges are drawn, and the model by ToMe with the first, corrected,
learns to answer as it does by plain ToMe with the second. The transformer and its head stay as they
are. Afterwards any r is one setting away: `--reducer=tocom/r=11`, or `/source_r=8/r=11` for a model
that was trained by ToMe with 8; `tdm_jax.models.folding.fold` makes it free.

Hardware: a GPU, or for a few thousand images of 112 pixels a CPU. Time: a step is an unreduced
forward pass, and an unreduced one with its gradient.
Top-1: the authors report up to 2.3 points on CIFAR-100 (DeiT-B; arXiv 2408.06798).
"""

from ml_collections import ConfigDict

from tdm_jax.configs import folder_finetune


def get_config() -> ConfigDict:
    config = folder_finetune.get_config()
    config.reset_head = False
    config.reducer.name = "tocom"
    config.distill.kind = "soft"
    config.distill.teacher = "init_from"
    config.distill.weight = 1.0
    config.distill.temperature = 1.0
    config.optim.only = ("reducer",)
    config.optim.learning_rate = 1e-3 * 512 / 64  # 1e-3 at the batch of 64: the maps start at 0
    config.optim.weight_decay = 0.0
    config.epochs = 10.0
    return config
