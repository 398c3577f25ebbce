"""DeiT-B adapted to TDM at keep rate 0.7 on ImageNet: 30 epochs from DeiT's own weights.

    python -m tdm_jax.train --config=configs/deit_base_finetune.py \
        --workdir=runs/deit_base_finetune \
        --config.data.data_dir=/data/tfds --config.init_from=deit_base_patch16_224-b5f2ef4d.pth

Hardware: a TPU v5e-64, or sixteen GPUs.
Time: not measured here; a tenth of the epochs of training from scratch.
Top-1: not in the paper. Not reproduced here.
"""

from ml_collections import ConfigDict

from tdm_jax.configs import deit


def get_config() -> ConfigDict:
    return deit.fine_tune("base", "deit_base_patch16_224-b5f2ef4d.pth")
