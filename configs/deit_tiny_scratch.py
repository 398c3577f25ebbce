"""DeiT-T with TDM at keep rate 0.7 on ImageNet, 300 epochs from scratch.

    python -m tdm_jax.train --config=configs/deit_tiny_scratch.py \
        --workdir=runs/deit_tiny_scratch \
        --config.data.data_dir=/data/tfds

Hardware: a TPU v5e-8 or one GPU of 80 GB and more.
Time: not measured here; `python -m tdm_jax.compile_check` tells whether a step fits.
Top-1: 72.3% in the paper (DeiT-T itself 72.2%). Not reproduced here.
"""

from ml_collections import ConfigDict

from tdm_jax.configs import deit


def get_config() -> ConfigDict:
    return deit.from_scratch("tiny")
