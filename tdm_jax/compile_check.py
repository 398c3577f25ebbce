"""Does a training fit? `python -m tdm_jax.compile_check --config=... --topology=v5e:4x4`.

Compiles the real training step for devices that this machine does not have, and reports memory and
FLOPs per device and what the devices send each other. `--topology` is

    v5e:4x4       a TPU slice: its own compiler, from `pip install "jax[tpu]"`; no TPU is needed
    gpu:8x80      eight devices of 80 GiB each, partitioned as for any mesh; the collectives and the
                  state are exact, temporaries are those of XLA's CPU compiler and only a hint

Of several, smaller ones first, it stops at the first that fits. Each takes minutes. The data need
not be there: `--examples` and `--classes` say how many there are (ImageNet's).
"""

from absl import flags

from tdm_jax.analysis.compilation import check_machines, devices_of
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import load_teacher, make_experiment


def define_flags() -> None:
    """The command's flags."""
    define_config(None, "What to train: a Python file such as those in configs/.")
    flags.DEFINE_list(
        "topology", None, "Machines, smaller ones first: v5e:4x4, ..., or gpu:<devices>x<GiB>."
    )
    flags.DEFINE_integer("examples", 1_281_167, "Number of training examples.", 1)
    flags.DEFINE_integer("classes", 1000, "Number of classes.", 1)
    flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    """The command."""
    FLAGS = flags.FLAGS
    settings = parse(FLAGS.config)
    # The last is the largest, and there must be devices enough for it from the start.
    machines = {name: devices_of(name) for name in reversed(FLAGS.topology)}
    teacher, variables = load_teacher(settings)
    dataset = FLAGS.examples, FLAGS.classes
    experiment = make_experiment(settings, teacher=teacher, dataset=dataset)
    check_machines({name: machines[name] for name in FLAGS.topology}, experiment, variables)


if __name__ == "__main__":
    define_flags()
    start.run(main)
