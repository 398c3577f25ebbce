"""DeiT-S with TDM at keep rate 0.7 on ImageNet, 300 epochs from scratch.

    python -m tdm_jax.train --config=configs/deit_small_scratch.py \
        --workdir=runs/deit_small_scratch \
        --config.data.data_dir=/data/tfds

Hardware: a TPU v5e-16, or eight GPUs.
Time: not measured here; `python -m tdm_jax.compile_check` tells whether a step fits.
Top-1: 79.58% in the authors' log (DeiT-S itself 79.8%). Not reproduced here.
"""

from ml_collections import ConfigDict

from tdm_jax.configs import deit


def get_config() -> ConfigDict:
    return deit.from_scratch("small")
