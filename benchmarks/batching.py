"""Images per second that many clients get out of one model, against the bare network.

Clients that ask for one image each, one after the other, go through the queue of the API's
inference thread, from pixels to probabilities; HTTP and the decoding of files are left out. Beside
it: the network's bare forward on a normalized batch that lies ready, as it was trained and with its
batch norms folded, and the same network asked for one image at a time, which is what an endpoint
without a queue comes to. Each has a process of its own; they take turns.

    python -m benchmarks.batching [--device cuda] [--arch resnet50] [--image-size 224]
                                  [--batch-size 32] [--clients 64] [--rounds R] [--seconds S]
                                  [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.figures import Figure, write_figures

LEAST_OF_BARE = 0.8
"""Share of the bare forward's images per second that the clients should get together."""


@dataclass(frozen=True)
class Problem:
    """Which network, on what, for how long."""

    arch: str
    image_size: int
    batch_size: int
    clients: int
    device: str
    seconds: float
    storage: Path


KEY = "model"
Turn = Callable[[], tuple[float, list[float]]]
"""Images per second, and each request's seconds."""
_turn: Turn | None = None


def prepare(name: str, problem: Problem) -> None:
    """Makes this process one contender's. Nothing of torch is called before: its threads belong to
    the thread that called it first."""
    global _turn
    _turn = CONTENDERS[name](problem)


def take_turn() -> tuple[float, list[float]]:
    assert _turn is not None, "prepared"
    return _turn()


def bare(problem: Problem, *, folded: bool) -> Turn:
    """The forward on one batch, over and over."""
    import torch

    from shared.vision.bundle import read_bundle, restore_model
    from shared.vision.folding import fold

    device = torch.device(problem.device)
    bundle, weights = read_bundle(problem.storage / KEY)
    network = restore_model(bundle, weights, device)
    network = fold(network) if folded else network
    shape = (problem.batch_size, 3, problem.image_size, problem.image_size)
    batch = torch.randn(shape, device=device).to(memory_format=torch.channels_last)

    def forward() -> int:
        with torch.inference_mode():
            network(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return problem.batch_size

    return lambda: repeated(forward, problem.seconds)


def alone(problem: Problem) -> Turn:
    """One image at a time, from pixels to probabilities."""
    from shared.vision.bundle import read_bundle
    from shared.vision.predictor import Predictor

    predictor = Predictor(*read_bundle(problem.storage / KEY), problem.device)
    image = drawn(1, problem.image_size)
    return lambda: repeated(lambda: len(predictor.predict(image)), problem.seconds)


def clients(problem: Problem) -> Turn:
    """Through the queue, as `POST /predict` does it."""
    from api.serving.cache import ModelCache, ModelKey
    from api.serving.inference import Inference
    from shared.storage import Storage

    cache = ModelCache(Storage(problem.storage), 2**31, problem.device)
    inference = Inference(cache, problem.clients)
    key = ModelKey(KEY, KEY, problem.image_size)
    images = drawn(problem.clients, problem.image_size)

    def turn() -> tuple[float, list[float]]:
        times: list[float] = []
        began = time.perf_counter()

        def client(place: int) -> None:
            while (asked := time.perf_counter()) < began + problem.seconds:
                inference.submit(key, images[place : place + 1]).result()
                times.append(time.perf_counter() - asked)

        threads = [
            threading.Thread(target=client, args=(place,)) for place in range(problem.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(times) / (time.perf_counter() - began), times

    return turn


CONTENDERS: dict[str, Callable[[Problem], Turn]] = {
    "bare": lambda problem: bare(problem, folded=False),
    "bare, folded": lambda problem: bare(problem, folded=True),
    "one at a time": alone,
    "clients": clients,
}


def repeated(work: Callable[[], int], seconds: float) -> tuple[float, list[float]]:
    """`work` returns how many images it did."""
    num_images, times = 0, []
    began = last = time.perf_counter()
    while last < began + seconds:
        num_images += work()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return num_images / (last - began), times


def drawn(number: int, image_size: int) -> npt.NDArray[np.uint8]:
    """Noise, uint8 [number, image_size, image_size, 3]."""
    shape = (number, image_size, image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def store_model(folder: Path, arch: str, image_size: int) -> None:
    """A checkpoint with drawn weights, as a training would leave it. Run in a process of its
    own, since it needs torch."""
    import torch

    from shared.storage import Storage
    from shared.vision.architectures import build_model
    from shared.vision.bundle import Bundle, BundleDataset, write_bundle
    from shared.vision.preprocessing import Preprocessing
    from skipline.specs import TrainSpec

    torch.manual_seed(0)
    stem = "small" if image_size <= 64 else "imagenet"
    spec = TrainSpec.model_validate(
        {
            "kind": "train",
            "dataset": "noise",
            "model": {"arch": arch, "stem": stem},
            "image_size": image_size,
            "channels_last": True,
        }
    )
    half = (0.5, 0.5, 0.5)
    bundle = Bundle(
        spec=spec,
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(image_size=image_size, channel_mean=half, channel_std=half),
        dataset=BundleDataset(name="noise", id="noise", hash="noise"),
        epoch=1,
        step=1,
        metrics={},
    )
    weights = build_model(spec.model, 10, image_size).state_dict()
    with Storage(folder).writing(KEY, "benchmark") as staged:
        write_bundle(staged, bundle, weights)


def measure(problem: Problem, num_rounds: int) -> list[Figure]:
    """All contenders, in turn, `num_rounds` times; the first round does not count."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as maker:
        maker.submit(store_model, problem.storage, problem.arch, problem.image_size).result()
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    times: list[float] = []
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                ProcessPoolExecutor(1, context, initializer=prepare, initargs=(name, problem))
            )
            for name in CONTENDERS
        }
        for number in range(num_rounds + 1):
            for name, process in processes.items():
                speed, seconds = process.submit(take_turn).result()
                if number > 0:
                    speeds[name].append(speed)
                    times += seconds if name == "clients" else []
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ordered = sorted(times)
    figures = [Figure(name, speed, "images/s") for name, speed in medians.items()]
    served = medians["clients"]
    return [
        *figures,
        Figure("clients / bare", served / medians["bare"], "", at_least=LEAST_OF_BARE),
        Figure("clients / bare, folded", served / medians["bare, folded"], ""),
        Figure("clients / one at a time", served / medians["one at a time"], ""),
        Figure("a client waits, median", 1000 * statistics.median(ordered), "ms"),
        Figure("a client waits, 99 %", 1000 * ordered[int(0.99 * len(ordered))], "ms"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many clients of one model, without HTTP.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="of the bare forward")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(words)
    if min(asked.image_size, asked.batch_size, asked.clients, asked.rounds) < 1:
        parser.error("numbers start at 1")
    # Of the processes that wait for their turn, none should spin meanwhile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(
            arch=asked.arch,
            image_size=asked.image_size,
            batch_size=asked.batch_size,
            clients=asked.clients,
            device=asked.device,
            seconds=asked.seconds,
            storage=Path(folder),
        )
        figures = measure(problem, asked.rounds)
    print(*figures, sep="\n")
    if asked.json:
        facts = {"arch": asked.arch, "device": asked.device, "image_size": str(asked.image_size)}
        write_figures(asked.json, facts, {"batching": figures})
    return 0 if all(figure.is_met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
