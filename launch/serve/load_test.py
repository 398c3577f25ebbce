r"""What a server stands, as Markdown: `python -m launch.serve.load_test --url=...`.

    python -m launch.serve.load_test --concurrency=1,8,32 --keep_rates=1,0.5
    python -m launch.serve.load_test --arrivals=20,40,80 --keep_rates=1,0.5,auto
    python -m launch.serve.load_test --mixed=10000

The first is a closed loop: each of so many clients sends its next image when it has the answer to
the one before. The second is an open one: images arrive at random, so many a second, whether
answers come or not; "auto" leaves the keep rate to the server. Keep rates take turns in every
round, so what else the machine does meets them all; a speed-up is the median over the rounds. The
third sends good and bad requests in random order and fails unless each is answered as it must be,
by the same replica to the end.
"""

import asyncio
import dataclasses
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from absl import flags

from launch.serve.made_images import photograph
from launch.serve.mixed_requests import kinds, send
from tdm_jax.cli import start
from tdm_jax.errors import InputError

FLAGS = flags.FLAGS
AUTO = "auto"
COLUMNS = (
    *("load", "keep rate", "GMACs", "p50 ms", "p99 ms", "images/s", "speed-up"),
    *("other answers", "answered by keep rate"),
)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("url", "http://127.0.0.1:8000", "Of the server.")
    flags.DEFINE_list("keep_rates", ["1", AUTO], "What is compared, the baseline first.")
    flags.DEFINE_list("concurrency", [], "Clients of a closed loop, each number in its turn.")
    flags.DEFINE_list("arrivals", [], "Images a second of an open loop, each in its turn.")
    flags.DEFINE_integer("mixed", 0, "Good and bad requests instead, so many.", 0)
    flags.DEFINE_integer("mixed_concurrency", 32, "Of these at once.", 1)
    flags.DEFINE_string("images", None, "Folder of JPEGs to send; by default two made ones.")
    flags.DEFINE_integer("rounds", 5, "Turns of each keep rate.", 1)
    flags.DEFINE_float("seconds", 5.0, "Of a turn.", 0.1)
    flags.DEFINE_integer("seed", 0, "Of the order and the arrivals.")


@dataclasses.dataclass
class Turn:
    """What one turn of one keep rate was answered.

    Attributes:
      latencies: seconds of each answer with status 200.
      statuses: of all answers.
      rates: keep rates that answered.
      seconds: from the first request to the last answer.
    """

    latencies: list[float] = dataclasses.field(default_factory=list)
    statuses: Counter[Any] = dataclasses.field(default_factory=Counter)
    rates: Counter[float] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def throughput(self) -> float:
        """Images answered a second."""
        return len(self.latencies) / self.seconds


async def ask(
    session: aiohttp.ClientSession, url: str, rate: str, image: bytes, turn: Turn
) -> None:
    """Sends an image and notes the answer."""
    began = time.perf_counter()
    query = {} if rate == AUTO else {"keep_rate": rate}
    headers = {"Content-Type": "image/jpeg"}
    try:
        where = f"{url}/predict"
        async with session.post(where, params=query, data=image, headers=headers) as answer:
            said = await answer.json(content_type=None)
            turn.statuses[answer.status] += 1
    except (aiohttp.ClientError, TimeoutError) as error:
        turn.statuses[type(error).__name__] += 1
        return
    if answer.status == 200:
        turn.latencies.append(time.perf_counter() - began)
        turn.rates[said["keep_rate"]] += 1


async def closed(
    session: aiohttp.ClientSession, url: str, rate: str, images: list[bytes], clients: int
) -> Turn:
    """One turn of so many clients, each of which waits for its answer."""
    turn, began = Turn(), time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() < began + FLAGS.seconds:
            image = images[(number + len(turn.latencies)) % len(images)]
            await ask(session, url, rate, image, turn)

    await asyncio.gather(*map(client, range(clients)))
    turn.seconds = time.perf_counter() - began
    return turn


async def opened(
    session: aiohttp.ClientSession, url: str, rate: str, images: list[bytes], arrivals: float
) -> Turn:
    """One turn of images that arrive by chance, so many a second."""
    draw, turn, tasks = random.Random(FLAGS.seed), Turn(), []
    began = due = time.perf_counter()
    while (due := due + draw.expovariate(arrivals)) < began + FLAGS.seconds:
        await asyncio.sleep(due - time.perf_counter())
        image = draw.choice(images)
        tasks.append(asyncio.create_task(ask(session, url, rate, image, turn)))
    await asyncio.gather(*tasks)
    turn.seconds = time.perf_counter() - began
    return turn


async def compare(session: aiohttp.ClientSession, url: str, images: list[bytes]) -> None:
    """Prints a table of all keep rates at all loads."""
    rates = FLAGS.keep_rates
    macs = {f"{x['keep_rate']:g}": x["multiply_adds"] for x in (await metadata(session))["levels"]}
    for rate in rates:
        if rate not in (*macs, AUTO):
            raise InputError(f"--keep_rates: expected {', '.join(macs)} or {AUTO}; got {rate}")
    loads: list[tuple[str, Any, float]]
    loads = [(f"{n} at once", closed, int(n)) for n in FLAGS.concurrency]
    loads += [(f"{n} images/s", opened, float(n)) for n in FLAGS.arrivals]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, run, load in loads:
        turns: dict[str, list[Turn]] = {rate: [] for rate in rates}
        for number in range(FLAGS.rounds):
            for place in range(len(rates)):
                rate = rates[(place + number) % len(rates)]
                turns[rate].append(await run(session, url, rate, images, load))
        for rate in rates:
            print(row(name, rate, macs.get(rate), turns[rate], turns[rates[0]]), flush=True)


def row(load: str, rate: str, macs: int | None, turns: list[Turn], baseline: list[Turn]) -> str:
    """A line of the table."""
    latencies = [1000 * seconds for turn in turns for seconds in turn.latencies] or [float("nan")]
    statuses = sum((turn.statuses for turn in turns), Counter[Any]())
    rates = sum((turn.rates for turn in turns), Counter[float]())
    speed_up = statistics.median(
        one.throughput / other.throughput if other.latencies else float("nan")
        for one, other in zip(turns, baseline, strict=True)
    )
    others = ", ".join(f"{n} × {status}" for status, n in statuses.items() if status != 200)
    total = sum(rates.values())
    cells = (
        load,
        rate,
        "" if macs is None else f"{macs / 1e9:.2f}",
        *(f"{np.percentile(latencies, q):.0f}" for q in (50, 99)),
        f"{statistics.median(turn.throughput for turn in turns):.1f}",
        f"{speed_up:.2f}",
        others or "none",
        ", ".join(f"{r:g}: {n / total:.0%}" for r, n in sorted(rates.items(), reverse=True)),
    )
    return f"| {' | '.join(cells)} |"


async def metadata(session: aiohttp.ClientSession, path: str = "metadata") -> dict[str, Any]:
    """What the server says of itself.

    Raises:
      InputError: it says nothing.
    """
    try:
        async with session.get(f"{FLAGS.url}/{path}") as answer:
            answer.raise_for_status()
            return await answer.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise InputError(f"--url={FLAGS.url}: expected a server; got {error!r}") from error


async def mixed(session: aiohttp.ClientSession, url: str) -> None:
    """Sends good and bad requests, prints what became of them.

    Raises:
      InputError: one was lost or not answered as it must be, or the server did not stand it.
    """
    table, began = kinds(await metadata(session)), time.monotonic()
    draw = random.Random(FLAGS.seed)
    names = draw.choices(list(table), [kind.share for kind in table.values()], k=FLAGS.mixed)
    order, found = iter(names), {name: Counter[Any]() for name in table}

    async def client() -> None:
        for name in order:
            found[name][await send(session, url, table[name])] += 1

    await asyncio.gather(*(client() for _ in range(FLAGS.mixed_concurrency)))
    took = time.monotonic() - began
    await asyncio.sleep(1)  # what clients left behind
    after = await metadata(session, "healthz")
    print("| request | expected | sent | answered so | otherwise |\n|---|---|---|---|---|")
    for name, kind in table.items():
        sent, right = found[name].total(), found[name].pop(kind.status, 0)
        others = ", ".join(f"{n} × {status}" for status, n in found[name].items())
        print(f"| {name} | {kind.status} | {sent} | {right} | {others or 'none'} |")
    print(f"\n{FLAGS.mixed} requests in {took:.0f} s; then /healthz: {after}")
    wrong = sum(counter.total() for counter in found.values())
    if wrong or after["seconds"] < took or after["waiting"] or after["compilations"]:
        raise InputError(f"{wrong} requests were not answered as expected; the server: {after}")


def pictures() -> list[bytes]:
    """The images to send."""
    if FLAGS.images is None:
        return [photograph(seed=seed) for seed in range(2)]
    found = sorted(Path(FLAGS.images).rglob("*.jp*g"))[:100]
    if not found:
        raise InputError(f"--images={FLAGS.images}: expected JPEG files; got none")
    return [path.read_bytes() for path in found]


async def test() -> None:
    """All that the flags ask for."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        if FLAGS.mixed:
            await mixed(session, FLAGS.url)
        else:
            await compare(session, FLAGS.url, pictures())


def main() -> None:
    """The command."""
    if not (FLAGS.mixed or FLAGS.concurrency or FLAGS.arrivals):
        raise InputError("expected --concurrency, --arrivals or --mixed; got none")
    asyncio.run(test())


if __name__ == "__main__":
    define_flags()
    start.run(main)
