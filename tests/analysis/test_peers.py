"""Other runtimes: what is said between the processes, what fails, and the rows of the benchmark.

Covers tdm_jax.analysis.peer_worker.
"""

import os
import sys

import pytest

from tdm_jax import benchmark as command
from tdm_jax import create_model
from tdm_jax.analysis import peer_worker, peers
from tdm_jax.analysis.benchmark import OUT_OF_MEMORY, benchmark
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.timing import BASELINE, FASTER, Measurement, Timing
from tdm_jax.errors import InputError
from tests import commands

TINY = {
    "image_size": 32,
    "patch_size": 16,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}
QUICK = Timing(rounds=2, min_seconds=0.0, warmup=1)
# The worker with a runtime that needs no package; the batch size says how it behaves.
STUB = """
import importlib.util, os, sys, time

spec = importlib.util.spec_from_file_location("worker", {worker!r})
worker = sys.modules["worker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

class OutOfMemoryError(Exception):
    pass

def program(job):
    print("a library's own words")
    assert job.shape == (job.batch_size, 3, 32, 32) and job.threads >= 1, job
    calls = 0
    def call():
        nonlocal calls
        calls += 1
        time.sleep(0.05)
        if job.batch_size == 3:
            raise OutOfMemoryError
        if job.batch_size == 4:
            raise ValueError("it does not\\nwork")
        if job.batch_size == 5 and calls == 3:
            print("Illegal instruction", file=sys.stderr, flush=True)
            os._exit(7)
    return call

def check(device, models):
    assert models and all(model["architecture"] for model in models)

worker.check = check
worker.RUNTIMES["torch"] = worker.Runtime(program, ("json",), ("forward", "train"))
worker.RUNTIMES["onnxruntime"] = worker.Runtime(program, ("json",), dtypes=("float32",))
worker.RUNTIMES["openvino"] = worker.Runtime(program, ("json", "no_such_package"))
worker.main()
"""


@pytest.fixture
def model():
    return create_model("vit", **TINY)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    script = tmp_path / "stub.py"
    script.write_text(STUB.format(worker=str(peers.WORKER)))
    monkeypatch.setattr(peers, "WORKER", script)


def test_every_peer_has_its_runtime():
    assert peers.PEERS.keys() == peer_worker.RUNTIMES.keys()


def test_a_program_elsewhere_takes_its_turns(stub, model):
    with peers.started(["torch"], sys.executable, [model]) as (peer,):
        assert peer.versions == {"json": "2.0.9"}
        program = peer.program(model, "train", "bfloat16", 2)
        assert program.images == 2
        assert program.compile_seconds > 0.05
        assert program.memory_bytes is None
        # Of one call, however many there were.
        assert 0.05 <= program.seconds(10) < 0.5
    assert peer._process.poll() == 0


def test_what_a_runtime_lacks_it_says(stub, model):
    with peers.started(["onnxruntime"], sys.executable, [model]) as (peer,):
        assert peer.program(model, "train", "float32", 2) == "no train"
        assert peer.program(model, "forward", "bfloat16", 2) == "no bfloat16"
        assert peer.program(model, "forward", "float32", 3) == OUT_OF_MEMORY
        assert peer.program(model, "forward", "float32", 2).seconds(1) > 0


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (4, "PyTorch: ValueError: it does not work"),
        (5, "PyTorch: its process ended with code 7: Illegal instruction"),
    ],
)
def test_a_failure_ends_every_process(stub, model, batch_size, message):
    def fail(running):
        program = running[0].program(model, "forward", "float32", batch_size)
        program.seconds(2)

    names = ["torch", "onnxruntime"]
    with (
        pytest.raises(InputError, match=f"^{message}$"),
        peers.started(names, sys.executable, [model]) as running,
    ):
        fail(running)
    assert [peer._process.poll() for peer in running] == [0 if batch_size == 4 else 7, 0]


def test_a_process_that_hangs_is_killed(monkeypatch, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(peers, "WORKER", script)
    monkeypatch.setattr(peers, "_PATIENCE", 0.1)
    peer = peers.Peer("torch", sys.executable)
    peer.close()
    assert peer._process.poll() < 0


@pytest.mark.parametrize(
    ("names", "python", "message"),
    [
        (["tensorrt"], sys.executable, "unknown peer 'tensorrt'; .*onnxruntime, openvino, torch"),
        (["torch"], None, "--peers: expected --peers_python, a Python that has them; got none"),
        (["torch"], "no/python", "--peers_python: expected a Python; got no/python: "),
        (["torch"], "/bin/echo", "--peers_python: expected a Python; it said '-I "),
        (["torch"], "/bin/cat", "PyTorch: its process ended with code 1: "),
        (["torch", "openvino"], sys.executable, "OpenVINO: .* No module named 'no_such_package'"),
    ],
)
def test_bad_input_is_said_before_anything_is_measured(stub, model, names, python, message):
    with pytest.raises(InputError, match=message), peers.started(names, python, [model]):
        pytest.fail("it started")


def test_a_model_that_timm_lacks(stub):
    model = create_model("vit", **TINY, pool="token_avg")
    with (
        pytest.raises(InputError, match="timm has no pool='token_avg'"),
        peers.started(["torch"], sys.executable, [model]),
    ):
        pytest.fail("it started")


def test_a_gpu_wants_another_gpu():
    with pytest.raises(RuntimeError, match="expected a CPU; got cuda"):
        peer_worker.Worker("onnxruntime", "cuda", 1, [])


def test_an_architecture_is_the_models_own():
    found = peers.describe(create_model("vit_small_patch14_dinov2", image_size=224))
    assert found["architecture"] == "vit_base_patch16_224"
    asked = {"img_size": [224, 224], "patch_size": 14, "embed_dim": 384, "num_classes": 0}
    assert asked.items() <= found["model_args"].items()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1.0, 1.0), FASTER), ((4.0, 4.0), peers.SLOWER), ((1.0, 4.0), peers.UNCLEAR)],
)
def test_verdicts(seconds, expected):
    assert peers.verdict(Measurement(2, seconds, baseline=(1.0, 1.0))) == expected


def test_rows_of_other_runtimes_stand_below_ours(stub, model):
    candidate = Candidate("tiny", "none", None, model)
    with peers.started(["torch", "onnxruntime"], sys.executable, [model]) as running:
        rows = benchmark(
            [candidate],
            batch_sizes=[2],
            modes=["forward"],
            dtypes=["bfloat16"],
            timing=QUICK,
            peers=running,
        )
    ours, torch, onnxruntime = rows
    assert [row.method for row in rows] == ["none", "none (PyTorch)", "none (ONNX Runtime)"]
    assert {(row.model, row.mode, row.dtype, row.batch_size) for row in rows} == {
        ("tiny", "forward", "bfloat16", 2)
    }
    assert (ours.verdict, ours.speedup) == (BASELINE, 1.0)
    assert torch.verdict in (FASTER, peers.SLOWER, peers.UNCLEAR)
    assert torch.speedup > 0
    assert torch.latency_seconds >= 0.05
    assert (onnxruntime.verdict, onnxruntime.speedup) == ("no bfloat16", None)


def test_the_command_says_what_ran(stub, monkeypatch, model, capsys, tmp_path):
    candidate = Candidate("tiny", "none", None, model)
    monkeypatch.setattr(command, "make_candidates", lambda **names: [candidate])
    flags = ["--batch_sizes=2", "--modes=forward", "--dtypes=float32", "--rounds=1"]
    flags += ["--min_seconds=0", "--peers=torch", f"--peers_python={sys.executable}"]
    commands.run(command, *flags, f"--output={tmp_path}")
    printed = capsys.readouterr().out
    assert "| none (PyTorch) |" in printed
    assert printed.endswith(", json 2.0.9\n")
    assert '"json": "2.0.9"' in (tmp_path / "benchmark.json").read_text()
    with pytest.raises(InputError, match="--peers: expected none with --advise"):
        commands.run(command, *flags, "--advise=1")


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_the_real_runtimes(name, model):
    if not (python := os.environ.get("TDM_JAX_PEERS_PYTHON")):
        pytest.skip("TDM_JAX_PEERS_PYTHON names no environment with other runtimes")
    with peers.started([name], python, [model]) as (peer,):
        for mode in peer_worker.RUNTIMES[name].modes:
            program = peer.program(model, mode, "float32", 2)
            assert program.seconds(2) > 0
