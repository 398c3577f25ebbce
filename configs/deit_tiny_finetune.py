"""DeiT-T adapted to TDM at keep rate 0.7 on ImageNet: 30 epochs from DeiT's own weights.

    python -m tdm_jax.train --config=configs/deit_tiny_finetune.py \
        --workdir=runs/deit_tiny_finetune \
        --config.data.data_dir=/data/tfds --config.init_from=deit_tiny_patch16_224-a1311bcf.pth

Hardware: a TPU v5e-8 or one GPU of 80 GB and more.
Time: not measured here; a tenth of the epochs of training from scratch.
Top-1: not in the paper. Not reproduced here.
"""

from ml_collections import ConfigDict

from tdm_jax.configs import deit


def get_config() -> ConfigDict:
    return deit.fine_tune("tiny", "deit_tiny_patch16_224-a1311bcf.pth")
