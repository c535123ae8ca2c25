"""Whole predictions over HTTP, against what a user would have otherwise.

The same network (ResNet-18 with a small stem, 10 classes) with the same weights on the same
machine, asked for 32 px PNGs over loopback by 1, 8 and 32 clients, each of which sends its next
image when it has its answer. Skipline's `/predict` does all that it does for anybody: the key is
checked, the alias looked up in the database, the answer calibrated. The others are in
`benchmarks/servers`, each in an environment of its own that is made here and sees the packages of
this one that it does not bring itself, torch above all. They take turns, back and forth; a server
runs in its own turn alone.

Then of Skipline alone: whether `/healthz` waits behind predictions, also where more clients ask
than may wait, whether good images suffer from damaged ones beside them, and 1,000 models of which
20 are asked for most.

    python -m benchmarks.serving [--rounds R] [--seconds S] [--only NAME ...] [--models N]
                                 [--environments FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from api.serving.acceleration import is_possible
from benchmarks.figures import Figure, write_figures
from benchmarks.http_load import Call, Load, load, once, probe

FOLDER = Path(__file__).parent / "servers"
CLIENTS = (1, 8, 32)
AT_LEAST = {1: 1.7, 32: 2.6}
"""Times the hand-written endpoint's requests per second, by clients."""
NUM_TOO_MANY = 128
"""Clients, of whom half may wait by default."""
NUM_IMAGES = 64
KEY = "the-benchmark's-key"
PNG = "image/png"
START_SECONDS = 180.0
STOP_SECONDS = 15.0
BATCH_WAIT = "0.001"
"""Seconds for which others that have to be told wait for a batch to fill up."""
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Workplace:
    """Folders: `home` of Skipline's, `scratch` for what others need; the weights' file."""

    home: Path
    scratch: Path
    weights: Path


@dataclass(frozen=True)
class Contender:
    """A server.

    Args:
        packages: for an environment of its own; none for this one.
        command: what starts it, from its environment's `bin`, the workplace and the port.
        call: that sends an image's file.
        labels: the best classes first, from the body of an answer.
        ready: a call that is answered with 200 as soon as it can be asked; by default an image.
        variables: of its environment.
        settle: waits until it is as fast as it gets.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Workplace, int], list[str]]
    call: Callable[[bytes], Call]
    labels: Callable[[Any], list[int]]
    ready: Call | None = None
    variables: Callable[[Workplace], dict[str, str]] = lambda place: {}
    settle: Callable[[Running], None] = lambda server: None


def form(name: str, path: str) -> Callable[[bytes], Call]:
    """A form with the file as its one part."""

    def call(image: bytes) -> Call:
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        body = f"{head}Content-Type: {PNG}\r\n\r\n".encode() + image + b"\r\n--edge--\r\n"
        return Call(path, body, "multipart/form-data; boundary=edge")

    return call


def inference_request(image: bytes) -> Call:
    """As the Open Inference Protocol has it."""
    given = {
        "name": "images",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(image).decode()],
    }
    body = json.dumps({"inputs": [given]}).encode()
    return Call("/v2/models/classifier/infer", body, "application/json")


def start_mlserver(bin_: Path, place: Workplace, port: int) -> list[str]:
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "debug": False,
    }
    model = {
        "name": "classifier",
        "implementation": "mlserver_model.Classifier",
        "max_batch_size": 64,
        "max_batch_time": float(BATCH_WAIT),
    }
    (place.scratch / "settings.json").write_text(json.dumps(settings))
    (place.scratch / "model-settings.json").write_text(json.dumps(model))
    return [str(bin_ / "mlserver"), "start", str(place.scratch)]


def skipline_variables(place: Workplace) -> dict[str, str]:
    return {"SKIPLINE_HOME": str(place.home), "SKIPLINE_API_KEY": KEY}


def settled(server: Running) -> None:
    """Models that are asked for often are converted meanwhile, in the first turn alone. Raises
    `RuntimeError` if that does not come to an end."""
    if not is_possible():
        return
    call = Call("/models/loaded", headers=(("Authorization", f"Bearer {KEY}"),))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        _, loaded = server.answer(call)
        if all(item["backend"] == "onnxruntime" for item in loaded["items"]):
            return
        server.answer(server.contender.call(images()[0]))
        time.sleep(0.1)
    raise RuntimeError("The model was not converted: the server's log says why")


SKIPLINE = Contender(
    name="Skipline",
    packages=(),
    command=lambda bin_, place, port: [
        *(sys.executable, "-m", "skipline", "api", "--role", "predict", "--port", str(port)),
    ],
    call=lambda image: Call("/predict", image, PNG, (("Authorization", f"Bearer {KEY}"),)),
    labels=lambda answer: [top["index"] for top in answer["predictions"][0]["top"]],
    ready=Call("/readyz"),
    variables=skipline_variables,
    settle=settled,
)
HANDWRITTEN = Contender(
    name="hand-written",
    packages=(),
    command=lambda bin_, place, port: [sys.executable, "handwritten.py"],
    call=lambda image: Call("/predict", image, PNG),
    labels=lambda answer: answer["labels"],
)
CONTENDERS = (
    SKIPLINE,
    HANDWRITTEN,
    Contender(
        name="LitServe",
        packages=("litserve",),
        command=lambda bin_, place, port: [str(bin_ / "python"), "litserve_server.py"],
        call=form("request", "/predict"),
        labels=lambda answer: answer["labels"],
    ),
    Contender(
        name="BentoML",
        packages=("bentoml",),
        command=lambda bin_, place, port: [
            *(str(bin_ / "bentoml"), "serve", "bentoml_service:Classifier"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        call=form("images", "/classify"),
        labels=lambda answer: answer[0]["labels"],
        variables=lambda place: {"BENTOML_HOME": str(place.scratch), "BENTOML_DO_NOT_TRACK": "1"},
    ),
    Contender(
        name="MLServer",
        # Its worker asks for an event loop that newer ones of uvloop do not make.
        packages=("mlserver", "uvloop<0.22"),
        command=start_mlserver,
        call=inference_request,
        labels=lambda answer: json.loads(answer["outputs"][0]["data"][0])["labels"],
    ),
    Contender(
        name="Ray Serve",
        packages=("ray[serve]",),
        command=lambda bin_, place, port: [str(bin_ / "python"), "ray_serve.py"],
        call=lambda image: Call("/", image, PNG),
        labels=lambda answer: answer["labels"],
        variables=lambda place: {"RAY_TMPDIR": str(place.scratch), "RAY_USAGE_STATS_ENABLED": "0"},
    ),
)


# --------------------------------------------------------------------------- environments, servers


def environment(contender: Contender, root: Path) -> Path:
    """The `bin` of the contender's environment, which is made if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    if not contender.packages:
        return Path(sys.executable).parent
    folder = root / contender.name.lower().replace(" ", "-")
    stamp = folder / "installed"
    wanted = "\n".join(contender.packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        [own] = folder.glob("lib/python*/site-packages")
        shared = [path for path in sys.path if path.endswith("site-packages")]
        (own / "zz_beside.pth").write_text("\n".join(shared) + "\n")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        quiet = [*pip, "--disable-pip-version-check", *contender.packages]
        subprocess.run(quiet, check=True, capture_output=True)
        stamp.write_text(wanted)
    return folder / "bin"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Running:
    """A server that can be asked. `token` is in the environment of all its processes."""

    contender: Contender
    port: int
    token: str

    def answer(self, call: Call) -> tuple[int, Any]:
        status, body = once(self.port, call)
        return status, json.loads(body) if body[:1] in (b"{", b"[") else body

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"BENCHMARK_TOKEN={self.token}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def peak_bytes(self) -> int:
        """The most memory that its processes had, each at its time."""
        total = 0
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        total += 1024 * int(line.split()[1])
        return total


@contextmanager
def running(
    contender: Contender, bin_: Path, place: Workplace, variables: dict[str, str] | None = None
) -> Iterator[Running]:
    """The server, from when it answers until none of its processes is left.

    Raises:
        RuntimeError: it does not answer; with what it has printed.
    """
    server = Running(contender, free_port(), uuid.uuid4().hex)
    environ = {name: v for name, v in os.environ.items() if not name.startswith("SKIPLINE_")}
    environ |= {
        "PATH": f"{bin_}:{environ['PATH']}",
        "PYTHONPATH": str(FOLDER),
        "OMP_NUM_THREADS": str(num_threads()),
        "MODEL_FILE": str(place.weights),
        "BATCH_WAIT": BATCH_WAIT,
        "PORT": str(server.port),
        "BENCHMARK_TOKEN": server.token,
        **contender.variables(place),
        **(variables or {}),
    }
    printed = place.scratch / "printed"
    with printed.open("wb") as file:
        process = subprocess.Popen(
            contender.command(bin_, place, server.port),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=FOLDER,
            env=environ,
        )
    try:
        _wait_until_ready(server, process, printed)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while (left := server.processes()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        process.wait(STOP_SECONDS)


def _wait_until_ready(server: Running, process: subprocess.Popen[bytes], printed: Path) -> None:
    call = server.contender.ready or server.contender.call(images()[0])
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError, EOFError, ValueError):
            if once(server.port, call)[0] == 200:
                return
        time.sleep(0.2)
    tail = printed.read_text(errors="replace")[-1500:]
    raise RuntimeError(f"{server.contender.name} does not answer. It printed: {tail}")


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------- images and models


def images() -> list[bytes]:
    """PNG files of 32 x 32 pixels: noise on a colour of their own."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        colour = rng.integers(40, 216, 3)
        pixels = np.clip(colour + rng.normal(0, 30, (32, 32, 3)), 0, 255)
        file = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def prepare(place: Workplace, num_models: int) -> list[str]:
    """Stores a model as a training would have left it, under the alias `production`, and as many
    copies as make `num_models`. Returns the checkpoints' ids. Run in a process of its own, since
    it needs torch."""
    import shutil

    from api import examples
    from shared import aliases, lifecycle, repository, schema
    from shared.bundle_files import WEIGHTS_FILE
    from shared.database import Database
    from shared.lifecycle import Capacity
    from shared.settings import Settings
    from shared.storage import Storage
    from skipline.catalog import BUILTIN_DATASETS, resolve
    from skipline.schemas import JobStatus, Report
    from skipline.specs import TrainSpec

    settings = Settings(home=place.home)
    storage = Storage(settings.artifacts_path)
    database = Database(settings.database)
    schema.migrate(database)
    spec = TrainSpec.model_validate({"dataset": "digits", "image_size": 32})
    spec = resolve(spec, BUILTIN_DATASETS["digits"])
    with database.session_scope() as session:
        job_id = repository.add_job(session, spec).id
        claim = lifecycle.claim(session, "benchmark", "here", 600, Capacity(("auto",)))
    assert claim is not None, "the only job"
    keys = [f"jobs/{job_id}/1/{number}" for number in range(1, num_models + 1)]
    with storage.writing(keys[0], "benchmark") as folder:
        write_model(folder, spec)
    first = storage.path(keys[0])
    shutil.copy(first / WEIGHTS_FILE, place.weights)
    for key in keys[1:]:
        shutil.copytree(first, storage.path(key), copy_function=os.link)
    with database.session_scope() as session:
        for number, key in enumerate(keys, start=1):
            repository.register_checkpoint(
                session,
                claim.fence,
                kinds=["epoch"],
                key=key,
                epoch=number,
                step=number,
                metrics={},
                num_bytes=storage.num_bytes(keys[0]),
            )
        rows = repository.list_checkpoints(session, job_id)
        ids = [row.id for row in reversed(rows)]
        report = examples.REPORT | {"checkpoint_id": ids[0]}
        repository.add_report(session, job_id, Report.model_validate(report))
        lifecycle.finish(session, claim.fence, JobStatus.succeeded, result={})
        aliases.move_alias(session, "production", ids[0], "")
    database.dispose()
    return ids


def write_model(folder: Path, spec: Any) -> None:
    """Drawn weights, with a last layer that tells the images apart."""
    import torch

    from shared.images import decode_image, to_square
    from shared.vision.architectures import build_model
    from shared.vision.bundle import Bundle, BundleDataset, write_bundle
    from shared.vision.preprocessing import Normalizer, Preprocessing

    torch.manual_seed(0)
    network = build_model(spec.model, 10, 32).eval()
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(image_size=32, channel_mean=half, channel_std=half)
    squares = np.stack([to_square(decode_image(file, 10_000), 32) for file in images()])
    with torch.no_grad():
        pixels = Normalizer(preprocessing, torch.device("cpu"))(torch.from_numpy(squares))
        logits = network(pixels)
        scale = 2 / logits.std(dim=0).mean()
        head: Any = network.get_submodule("fc")
        head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
        head.weight.mul_(scale)
    bundle = Bundle(
        spec=spec,
        classes=tuple("0123456789"),
        preprocessing=preprocessing,
        dataset=BundleDataset(name="noise", id="noise", hash="noise"),
        epoch=1,
        step=1,
        metrics={},
    )
    write_bundle(folder, bundle, network.state_dict())


# ----------------------------------------------------------------------------------------- servers


@dataclass
class Measured:
    """By number of clients: requests per second of each round, and all requests' seconds."""

    rates: dict[int, list[float]] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)

    def add(self, num_clients: int, result: Load) -> None:
        self.rates.setdefault(num_clients, []).append(result.rate)
        self.times.setdefault(num_clients, []).extend(result.times)

    def rate(self, num_clients: int) -> float:
        return statistics.median(self.rates[num_clients])

    def percentile(self, num_clients: int, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.times[num_clients])
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure_servers(
    contenders: Sequence[Contender],
    bins: dict[str, Path],
    place: Workplace,
    num_rounds: int,
    seconds: float,
    clients: Sequence[int] = CLIENTS,
) -> dict[str, Measured]:
    """Every contender in turn, `num_rounds` times, the second round backwards. Whoever names other
    classes than Skipline is not measured: it serves something else.

    Raises:
        RuntimeError: a server does not answer, or refuses or names something else.
    """
    measured = {contender.name: Measured() for contender in contenders}
    expected: list[list[int]] | None = None
    files = images()
    with ProcessPoolExecutor(1, SPAWN) as client:
        for number in range(num_rounds):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                calls = [contender.call(file) for file in files]
                with running(contender, bins[contender.name], place) as server:
                    found = [contender.labels(server.answer(call)[1]) for call in calls]
                    expected = expected or found
                    if (agreed := agreement(expected, found)) < 1:
                        raise RuntimeError(f"{contender.name} agrees in {agreed:.0%} alone")
                    contender.settle(server)
                    client.submit(load, server.port, calls, max(clients), seconds / 2).result()
                    for num_clients in clients:
                        asked = client.submit(load, server.port, calls, num_clients, seconds)
                        result = asked.result()
                        if result.refused:
                            raise RuntimeError(f"{contender.name} refused: {result.refused}")
                        measured[contender.name].add(num_clients, result)
    return measured


def agreement(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """Share of images of which the best class is the same."""
    same = [one[0] == other[0] for one, other in zip(expected, found, strict=True)]
    return sum(same) / len(same)


def server_figures(measured: dict[str, Measured]) -> list[Figure]:
    """What was measured, and how Skipline stands against the best of the others."""
    figures = []
    counts = list(next(iter(measured.values())).rates)
    for count in counts:
        for name, own in measured.items():
            told = f"{name}, {count} clients" if count > 1 else f"{name}, 1 client"
            figures.append(Figure(told, own.rate(count), "requests/s"))
            figures.append(Figure(f"{told}, p50", own.percentile(count, 0.5), "ms"))
            figures.append(Figure(f"{told}, p99", own.percentile(count, 0.99), "ms"))
    if SKIPLINE.name not in measured:
        return figures
    ours = measured[SKIPLINE.name]
    others = {name: own for name, own in measured.items() if name != SKIPLINE.name}
    for count in counts if others else ():
        best = max(other.rate(count) for other in others.values())
        soonest = min(other.percentile(count, 0.99) for other in others.values())
        told = f"{count} client{'s' if count > 1 else ''}"
        figures += [
            Figure(f"Skipline / best other, {told}", ours.rate(count) / best, "", at_least=1.0),
            Figure(
                f"Skipline / best other, {told}, p99",
                ours.percentile(count, 0.99) / soonest,
                "",
                at_most=1.0,
            ),
        ]
        if HANDWRITTEN.name in others:
            ratio = ours.rate(count) / others[HANDWRITTEN.name].rate(count)
            name = f"Skipline / hand-written, {told}"
            figures.append(Figure(name, ratio, "", at_least=AT_LEAST.get(count)))
    return figures


# ---------------------------------------------------------------------------------- Skipline alone


def health_figures(place: Workplace, seconds: float) -> list[Figure]:
    """How long `/healthz` takes while 32 clients ask for predictions."""
    calls = [SKIPLINE.call(file) for file in images()]
    bin_ = environment(SKIPLINE, place.scratch)
    with running(SKIPLINE, bin_, place) as server, ProcessPoolExecutor(2, SPAWN) as both:
        both.submit(load, server.port, calls, 32, 1.0).result()
        busy = both.submit(load, server.port, calls, 32, seconds + 1)
        times = sorted(both.submit(probe, server.port, Call("/healthz"), seconds, 0.02).result())
        refused = busy.result().refused
    assert not refused, refused
    return [
        Figure("/healthz beside 32 clients, p50", 1000 * statistics.median(times), "ms"),
        Figure(
            "/healthz beside 32 clients, p99",
            1000 * times[int(0.99 * len(times))],
            "ms",
            at_most=10.0,
        ),
    ]


def overload_figures(place: Workplace, seconds: float) -> list[Figure]:
    """The same beside more clients than may wait, of whom those that are told to come back later
    come back at once."""
    calls = [SKIPLINE.call(file) for file in images()]
    bin_ = environment(SKIPLINE, place.scratch)
    with running(SKIPLINE, bin_, place) as server, ProcessPoolExecutor(2, SPAWN) as both:
        both.submit(load, server.port, calls, 32, 1.0).result()
        calm = both.submit(load, server.port, calls, 32, seconds).result()
        busy = both.submit(load, server.port, calls, NUM_TOO_MANY, seconds + 1)
        times = sorted(both.submit(probe, server.port, Call("/healthz"), seconds, 0.02).result())
        overload = busy.result()
    other = {status: num for status, num in overload.refused.items() if status != 429}
    assert not other, other
    return [
        Figure("answered 429", overload.refused.get(429, 0) / overload.seconds, "requests/s"),
        Figure("answered 200 / with 32 clients", overload.rate / calm.rate, ""),
        Figure("/healthz meanwhile, p50", 1000 * statistics.median(times), "ms"),
        Figure("/healthz meanwhile, p99", 1000 * times[int(0.99 * len(times))], "ms", at_most=50.0),
    ]


def corrupt_figures(place: Workplace) -> list[Figure]:
    """75 good images among as many that are cut short, all of them asked for at once."""
    good = [SKIPLINE.call(file) for file in (images() * 2)[:75]]
    bad = [SKIPLINE.call(file[: len(file) // 2]) for file in (images() * 2)[:75]]
    mixed = [call for pair in zip(good, bad, strict=True) for call in pair]
    bin_ = environment(SKIPLINE, place.scratch)
    with running(SKIPLINE, bin_, place) as server, ProcessPoolExecutor(1, SPAWN) as client:
        statuses = client.submit(statuses_of, server.port, mixed, 32).result()
    return [
        Figure("good images refused, of 75", sum(s != 200 for s in statuses[::2]), "", at_most=0),
        Figure("damaged images refused, of 75", statuses[1::2].count(422), "", at_least=75),
    ]


def statuses_of(port: int, calls: Sequence[Call], num_clients: int) -> list[int]:
    """Of each call, which `num_clients` send between them."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(lambda call: once(port, call)[0], calls))


def model_figures(
    place: Workplace, ids: Sequence[str], num_hot: int, num_requests: int
) -> list[Figure]:
    """Many models, of which a few get nine requests in ten, with room for half as many more than
    those few. How often one of them had to be read again, and what memory it all took."""
    rng = random.Random(0)
    hot = list(ids[:num_hot])
    chosen = [rng.choice(hot if rng.random() < 0.9 else ids) for _ in range(num_requests)]
    model_bytes = place.weights.stat().st_size
    room = int(1.5 * num_hot) * model_bytes
    image = images()[0]
    authorized = (("Authorization", f"Bearer {KEY}"),)
    variables = {"SKIPLINE_MODEL_CACHE_BYTES": str(room)}
    with running(SKIPLINE, environment(SKIPLINE, place.scratch), place, variables) as server:
        before = server.peak_bytes()
        with ProcessPoolExecutor(1, SPAWN) as client:
            calls = [Call(f"/predict?model={name}", image, PNG, authorized) for name in chosen]
            warm = [Call(f"/predict?model={name}", image, PNG, authorized) for name in hot]
            client.submit(loads_of, server.port, warm, 8).result()
            began = time.perf_counter()
            loads = client.submit(loads_of, server.port, calls, 8).result()
            seconds = time.perf_counter() - began
        _, loaded = server.answer(Call("/models/loaded", headers=authorized))
        grown = server.peak_bytes() - before
    # Of a few models, the first time that each is asked for says most.
    goal = 0.05 if num_hot >= 10 else None
    of_hot = [was_loaded for name, was_loaded in zip(chosen, loads, strict=True) if name in hot]
    return [
        Figure(f"{len(ids)} models, {num_hot} of them hot", num_requests / seconds, "requests/s"),
        Figure("requests that waited for a load", sum(loads) / len(loads), ""),
        Figure("of those for hot models", sum(of_hot) / len(of_hot), "", at_most=goal),
        Figure("bytes of models in memory / allowed", loaded["num_bytes"] / room, "", at_most=1.0),
        Figure("memory grown / allowed for models", grown / room, "", at_most=1.5),
    ]


def loads_of(port: int, calls: Sequence[Call], num_clients: int) -> list[bool]:
    """Whether each call waited until its model was read."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(call: Call) -> bool:
        status, body = once(port, call)
        assert status == 200, body
        return bool(json.loads(body)["timing_ms"]["load"] > 1)

    with ThreadPoolExecutor(num_clients) as pool:
        return list(pool.map(ask, calls))


# -------------------------------------------------------------------------------------------- main


def main(words: Sequence[str] | None = None) -> int:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description="Whole predictions over HTTP.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000, help="spread over the models")
    parser.add_argument("--environments", type=Path, default=Path(".venv-servers"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(words)
    if min(asked.rounds, asked.models, asked.requests, *asked.clients) < 1 or asked.seconds <= 0:
        parser.error("numbers start at 1, and seconds above 0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parts: dict[str, list[Figure]] = {}
    with tempfile.TemporaryDirectory(prefix="skipline-serving-") as folder:
        place = Workplace(Path(folder) / "home", Path(folder), Path(folder) / "weights.safetensors")
        with ProcessPoolExecutor(1, SPAWN) as maker:
            ids = maker.submit(prepare, place, asked.models).result()
        contenders, bins, absent = [], {}, {}
        for contender in CONTENDERS:
            if contender.name in asked.only:
                try:
                    bins[contender.name] = environment(contender, asked.environments.absolute())
                    contenders.append(contender)
                except subprocess.CalledProcessError as error:
                    absent[contender.name] = error.stderr.decode(errors="replace")[-500:]
        for name, why in absent.items():
            print(f"{name} cannot be installed here and is left out: {why}")
        measured = measure_servers(
            contenders, bins, place, asked.rounds, asked.seconds, asked.clients
        )
        parts["servers"] = server_figures(measured)
        if SKIPLINE.name in asked.only:
            num_hot = max(1, asked.models // 50)
            parts["health"] = health_figures(place, asked.seconds)
            parts["overload"] = overload_figures(place, asked.seconds)
            parts["damaged"] = corrupt_figures(place)
            parts["models"] = model_figures(place, ids, num_hot, asked.requests)
    for part, figures in parts.items():
        print(f"\n{part}", *figures, sep="\n")
    if asked.json:
        facts = {
            "cores": str(num_threads()),
            "machine": platform.machine(),
            "left_out": ", ".join(absent),
        }
        write_figures(asked.json, facts, parts)
    everything = [figure for figures in parts.values() for figure in figures]
    return 0 if all(figure.is_met for figure in everything) else 1


if __name__ == "__main__":
    sys.exit(main())
