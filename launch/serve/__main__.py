r"""Serves exports from this machine: `python -m launch.serve --exports=...`.

    python -m launch.serve --exports=export/full,export/half --port=8000 --metrics_port=8080
    python -m launch.serve --config=launch/serve/config.yaml

SIGTERM and Ctrl-C finish what was accepted before the program ends. On a cluster, `serve deploy`
and launch/serve/kubernetes.yaml take its place.
"""

import signal
import threading
from pathlib import Path
from typing import Any

import pydantic
import ray
import yaml
from absl import flags
from ray import serve

from launch.serve import programs
from launch.serve.application import Settings, build
from tdm_jax.cli import start
from tdm_jax.errors import InputError

FLAGS = flags.FLAGS
NAME = "tdm_jax"


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_list("exports", [], "Folders of one model's exports at several keep rates.")
    flags.DEFINE_string("config", None, "YAML; the first application's `args` are taken.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
    flags.DEFINE_integer("port", 8000, "Port to listen on.", 1, 65535)
    flags.DEFINE_integer("metrics_port", None, "Port of Ray's metrics for Prometheus.", 1, 65535)
    flags.DEFINE_integer("num_cpus", None, "Cores that Ray may plan with; by default all.", 1)


def _settings() -> Settings:
    args: dict[str, Any] = {}
    if FLAGS.config is not None:
        try:
            args = yaml.safe_load(Path(FLAGS.config).read_text())["applications"][0]["args"]
        except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
            raise InputError(f"--config={FLAGS.config}: no args found: {error!r}") from error
    try:
        return Settings(**args | ({"exports": FLAGS.exports} if FLAGS.exports else {}))
    except pydantic.ValidationError as error:
        (first, *_) = error.errors()
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}: {first['msg']}; got {first['input']!r}") from error


def main() -> None:
    """The command."""
    settings = _settings()
    programs.read(settings.exports)  # what is wrong is said before Ray starts
    stop = threading.Event()
    ray.init(
        num_cpus=FLAGS.num_cpus,
        include_dashboard=False,
        object_store_memory=2**27,  # images do not go through it
        _metrics_export_port=FLAGS.metrics_port,
    )
    try:
        serve.start(http_options={"host": FLAGS.host, "port": FLAGS.port})
        serve.run(build(settings), name=NAME)
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, lambda *_: stop.set())
        start.note(f"serving {', '.join(settings.exports)} on http://{FLAGS.host}:{FLAGS.port}")
        stop.wait()
        start.note("finishing what was accepted")
        # A shutdown of Ray Serve would end its proxy with answers still to come.
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    define_flags()
    start.run(main)
