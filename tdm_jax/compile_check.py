r"""Does a training fit, and how fast can it be, on machines that are not there?

    python -m tdm_jax.compile_check --config=configs/deit_small_scratch.py --topology=v5e:4x4

compiles the real training step and reports, for each device, memory, FLOPs, what the devices send
each other, and the step time that products, memory and links allow, with the processors that
decoding images at that rate takes. `--topology` is

    v5e:4x4       a TPU slice: its own compiler, from `pip install "jax[tpu]"`; no TPU is needed
    gpu:8x80      eight devices of 80 GiB each, partitioned as for any mesh; the collectives and the
                  state are exact, temporaries are those of XLA's CPU compiler and only a hint

Of several, smaller ones first, it stops at the first that fits. Each takes minutes. The data need
not be there: `--examples` and `--classes` say how many there are (ImageNet's).

    python -m tdm_jax.compile_check --topology=v5e:1x1 --models=deit_small_patch16_224 \
        --methods=tdm --output=prices

compiles forward passes instead, and prints what the compiler says they cost
(`tdm_jax.analysis.pricing`).
"""

from absl import flags

from tdm_jax.analysis import results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.compilation import check_machines
from tdm_jax.analysis.machines import find_machine
from tdm_jax.analysis.pricing import TABLE, price
from tdm_jax.analysis.results import Result
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.errors import InputError, unknown
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import DTYPES, load_teacher, make_experiment

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    define_config(None, "What to train: a Python file such as those in configs/.")
    flags.DEFINE_list(
        "topology", None, "Machines, smaller ones first: v5e:4x4, ..., or gpu:<devices>x<GiB>."
    )
    flags.DEFINE_integer("examples", 1_281_167, "Number of training examples.", 1)
    flags.DEFINE_integer("classes", 1000, "Number of classes.", 1)
    text = "Images a second that one processor of a host reads, decodes and augments."
    flags.DEFINE_float("decoded_per_core", 330.0, text, 1e-6)
    shared.define_candidates()
    flags.DEFINE_integer("batch_size", 128, "Images of a forward pass.", 1)
    flags.DEFINE_string("dtype", "bfloat16", "Type of a forward pass.")
    shared.define_output("forward passes' prices.md, .csv and .json")
    flags.mark_flag_as_required("topology")


def main() -> None:
    """The command."""
    if FLAGS.config is None:
        _forward()
    elif FLAGS.models or FLAGS.candidate:
        raise InputError("expected --config, a training, or --models, forward passes; got both")
    else:
        _training()


def _training() -> None:
    settings = parse(FLAGS.config)
    # The last is the largest, and there must be devices enough for it from the start.
    machines = {name: find_machine(name) for name in reversed(FLAGS.topology)}
    teacher, variables = load_teacher(settings)
    dataset = FLAGS.examples, FLAGS.classes
    experiment = make_experiment(settings, teacher=teacher, dataset=dataset)
    ordered = [machines[name] for name in FLAGS.topology]
    check_machines(ordered, experiment, FLAGS.decoded_per_core, variables)


def _forward() -> None:
    output = shared.output()
    if not (FLAGS.models or FLAGS.candidate):
        raise InputError("expected --config, a training, or --models, forward passes; got neither")
    if len(FLAGS.topology) > 1:
        raise InputError(f"forward passes run on one device; got --topology={FLAGS.topology}")
    if FLAGS.dtype not in DTYPES:
        raise unknown("dtype", FLAGS.dtype, DTYPES)
    machine = find_machine(FLAGS.topology[0])
    about = {key: FLAGS[key].value for key in ("topology", "batch_size", "dtype")}
    rows: list[Result] = []

    def done(row: Result) -> None:
        rows.append(row)
        start.note(f"{row.model} {row.method}")
        if output:  # each takes minutes
            results.write(rows, output / "prices", about, columns=TABLE)

    price(
        make_candidates(**shared.candidates()),
        machine,
        batch_size=FLAGS.batch_size,
        dtype=DTYPES[FLAGS.dtype],
        done=done,
    )
    print(results.markdown(rows, TABLE))


if __name__ == "__main__":
    define_flags()
    start.run(main)
