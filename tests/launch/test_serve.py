"""A server and its clients, with Ray: what docs/serving.md says of it, to its end by SIGTERM.

Needs the extra `serve`: .ci/run runs it in an environment of its own.
"""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from launch.serve.made_images import photograph
from tdm_jax import Preprocessing, export_model, load_exported, preprocess
from tdm_jax.exporting.stablehlo import Options

ROOT = Path(__file__).parents[2]
WHY = "the extra serve is not installed; .ci/run runs this in an environment of its own"
pytest.importorskip("ray.serve", reason=WHY, exc_type=ImportError)
aiohttp = pytest.importorskip("aiohttp", reason=WHY)

PREPARED = Preprocessing()
JPEG = {"Content-Type": "image/jpeg"}
LIMITS = {"body_bytes": 2**20, "images": 4, "queue": 6, "seconds": 20, "retry_after": 7}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny_model):
    """Folders of one model at two keep rates."""
    root = tmp_path_factory.mktemp("exports")
    for name, arguments in (("full", ("none",)), ("half", ("tdm", 0.5))):
        layers = {} if name == "full" else {"layers": (1,)}
        model, variables = tiny_model(*arguments, preprocessing=PREPARED, **layers)
        options = Options(platforms=("cpu",), weights="beside")
        export_model(root / name, model, variables, options, labels=["ant", "bee", "cat"])
    return root


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`python -m launch.serve` in a process of its own."""

    def __init__(self, exports, folder, **args):
        self.port, self.metrics = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = {"exports": [str(exports / name) for name in ("full", "half")], **args}
        path = folder / f"{self.port}.yaml"
        path.write_text(yaml.safe_dump({"applications": [{"args": config}]}))
        self.log = folder / f"{self.port}.log"
        command = [sys.executable, "-m", "launch.serve", f"--config={path}", f"--port={self.port}"]
        command += [f"--metrics_port={self.metrics}", "--num_cpus=2"]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        while "\nserving " not in "\n" + self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def stop(self):
        """Ends it as a service manager does."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()

    def ask(self, *requests):
        """Statuses, bodies and headers of requests that are all under way at once.

        Each is the arguments of aiohttp's `request`, the method and the path first.
        """

        async def one(session, method, path, arguments):
            async with session.request(method, self.url + path, **arguments) as answer:
                return answer.status, await answer.json(), answer.headers

        async def all_of_them():
            async with aiohttp.ClientSession() as session:
                return await asyncio.gather(
                    *(one(session, method, path, rest) for method, path, rest in requests)
                )

        return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def server(exports, tmp_path_factory):
    thresholds = {"lower_at": 3, "raise_at": 1, "hold_seconds": 0.1}
    made = Server(
        exports,
        tmp_path_factory.mktemp("server"),
        limits=LIMITS,
        thresholds=thresholds,
        batch_wait_seconds=0.2,  # long enough for a queue to form
        batch_sizes=[1, 2, 4],
    )
    yield made
    if made.process.poll() is None:
        made.stop()


def predict(data, query="", **headers):
    return "POST", "/predict" + query, {"data": data, "headers": JPEG | headers}


def form(*images):
    data = aiohttp.FormData()
    for i, image in enumerate(images):
        data.add_field("image", image, filename=f"{i}.jpg", content_type="image/jpeg")
    return "POST", "/predict?keep_rate=1", {"data": data}


def test_what_it_is(server):
    (status, health, _), (_, about, _) = server.ask(
        ("GET", "/healthz", {}), ("GET", "/metadata", {})
    )
    assert (status, health["status"], health["compilations"]) == (200, "ok", 0)
    assert about["labels"] == ["ant", "bee", "cat"]
    assert [level["keep_rate"] for level in about["levels"]] == [1.0, 0.5]
    assert about["levels"][1]["reducer"] == {"name": "tdm", "keep_rate": 0.5, "layers": [1]}
    assert about["levels"][1]["tokens"] == [16, 16, 8, 8]
    assert list(about["levels"][0]["batch_seconds"]) == ["1", "2", "4"]
    assert about["settings"]["limits"]["queue"] == LIMITS["queue"]
    assert "exports" not in about["settings"]


@pytest.mark.parametrize(
    ("query", "header", "name"),
    [("?keep_rate=1", {}, "full"), ("", {"X-Keep-Rate": "0.50"}, "half")],
)
def test_its_answers_are_the_exports(server, exports, tiny_model, query, header, name):
    image = photograph()
    (status, said, _), *_ = server.ask(predict(image, query, **header))
    model, _ = tiny_model(preprocessing=PREPARED)
    exported = load_exported(exports / name)
    (logits,) = np.asarray(exported(preprocess(model)(Image.open(io.BytesIO(image)))))
    expected = np.exp(logits) / np.exp(logits).sum()
    assert (status, said["keep_rate"]) == (200, {"full": 1.0, "half": 0.5}[name])
    (only,) = said["images"]
    assert [best["class"] for best in only["top"]] == np.argsort(-logits).tolist()
    for best in only["top"]:
        assert best["label"] == ["ant", "bee", "cat"][best["class"]]
        assert best["probability"] == pytest.approx(expected[best["class"]], abs=1e-4)


def test_several_images_in_a_form(server):
    images = [photograph(kind, seed=i) for i, kind in enumerate(("JPEG", "PNG", "WEBP"))]
    ((status, said, _),) = server.ask(form(*images))
    assert status == 200
    assert [image["name"] for image in said["images"]] == ["0.jpg", "1.jpg", "2.jpg"]
    alone = [server.ask(predict(image, "?keep_rate=1&top_k=1"))[0][1] for image in images]
    assert (status, [image["name"] for image in said["images"]]) == (
        200,
        ["0.jpg", "1.jpg", "2.jpg"],
    )
    for image, one in zip(said["images"], alone, strict=True):
        (best,) = one["images"][0]["top"]
        assert image["top"][0]["class"] == best["class"]
        assert image["top"][0]["probability"] == pytest.approx(best["probability"], abs=1e-5)


def test_under_load_the_keep_rate_falls_and_returns(server):
    answers = server.ask(*[predict(photograph())] * 6)
    rates = [said["keep_rate"] for status, said, _ in answers]
    assert set(rates) == {1.0, 0.5}
    time.sleep(0.2)
    server.ask(predict(photograph()))
    time.sleep(0.2)
    ((_, said, _),) = server.ask(predict(photograph()))
    assert said["keep_rate"] == 1.0


def test_a_full_queue(server):
    answers = server.ask(*[predict(photograph(), "?keep_rate=1")] * 12)
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= LIMITS["queue"]
    for status, said, headers in answers:
        if status == 503:
            assert headers["Retry-After"] == "7"
            assert said["error"].startswith("busy: ")


def test_what_is_refused_and_what_is_lost(server):
    """Every kind of request at its status: `launch.serve.mixed_requests` is the table."""
    command = [sys.executable, "-m", "launch.serve.load_test", f"--url={server.url}"]
    done = subprocess.run(
        [*command, "--mixed=200", "--mixed_concurrency=2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " | " in line][1:]
    assert {row[1] for row in rows} >= {"200", "400", "404", "405", "413", "415", "422", "gone"}


def test_the_load_test(server):
    command = [sys.executable, "-m", "launch.serve.load_test", f"--url={server.url}"]
    flags = ["--concurrency=2", "--arrivals=5", "--keep_rates=1,auto", "--rounds=1", "--seconds=1"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[:2] for line in done.stdout.splitlines()[2:]] == [
        ["| 2 at once", "1"], ["| 2 at once", "auto"],
        ["| 5 images/s", "1"], ["| 5 images/s", "auto"],
    ]  # fmt: skip


def test_prometheus_reads_it(server):
    async def scraped():
        where = f"http://127.0.0.1:{server.metrics}/metrics"
        async with aiohttp.ClientSession() as session, session.get(where) as answer:
            return await answer.text()

    wanted = ("requests_total", "images_total", "waiting_images")
    wanted += ("batch_images_bucket", "latency_seconds_bucket")
    for _ in range(60):
        text = asyncio.run(scraped())
        missing = [name for name in wanted if f"ray_tdm_serve_{name}" not in text]
        if not missing:
            return
        time.sleep(0.5)
    assert missing == []


def test_a_shutdown_finishes_what_was_accepted(server):
    async def story():
        async def one(session):
            method, path, arguments = predict(photograph(), "?keep_rate=1")
            async with session.request(method, server.url + path, **arguments) as answer:
                return answer.status, await answer.json()

        async with aiohttp.ClientSession() as session:
            tasks = [asyncio.create_task(one(session)) for _ in range(LIMITS["queue"])]
            await asyncio.sleep(0.1)  # within the batches' wait
            assert not any(task.done() for task in tasks)
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(story())
    assert [status for status, _ in answers] == [200] * LIMITS["queue"]
    assert server.process.wait(60) == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        server.ask(("GET", "/healthz", {}))


def test_what_comes_too_late(exports, tmp_path):
    """A server whose batches wait longer than its requests may."""
    late = Server(exports, tmp_path, limits={"seconds": 0.5}, batch_wait_seconds=2, batch_sizes=[1])

    async def slowly():
        yield photograph()[:100]
        await asyncio.sleep(1.5)

    try:
        answers = late.ask(predict(photograph()), predict(slowly()))
        assert [status for status, _, _ in answers] == [504, 408]
        assert answers[0][1] == {"error": "not answered within 0.5 seconds"}
        assert answers[1][1] == {"error": "expected the whole body within 0.5 seconds"}
        ((_, health, _),) = late.ask(("GET", "/healthz", {}))
        assert health["waiting"] == 0
    finally:
        late.stop()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exports=nowhere"], "nowhere/manifest.json: not readable"),
        ([], "exports: Field required"),
        (["--config=nowhere.yaml"], "--config=nowhere.yaml: no args found"),
    ],
)
def test_what_is_wrong_is_said_before_ray_starts(flags, message):
    command = [sys.executable, "-m", "launch.serve", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_configurations_are_rays():
    from ray.serve.schema import ServeDeploySchema

    from launch.serve.application import Settings

    service = yaml.safe_load((ROOT / "launch/serve/kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    local = (ROOT / "launch/serve/config.yaml").read_text()
    for text in (local, service["spec"]["serveConfigV2"]):
        schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
        Settings(**schema.applications[0].args)
    given = yaml.safe_load(local)["applications"][0]["args"]
    assert Settings(exports=given["exports"]).model_dump() == given  # the defaults, all of them
