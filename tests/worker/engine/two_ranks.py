"""What two processes do together for `test_distributed`, and how they are started."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from shared.vision.preprocessing import Normalizer
from tests.worker.engine.tiny import (
    PREPROCESSING,
    Recorder,
    ReleaseAt,
    Run,
    colored,
    run_fit,
    tiny_model,
    tiny_spec,
)
from worker.engine.data import DeviceData
from worker.engine.distributed import Ranks, SyncedBatchNorm2d
from worker.engine.evaluate import evaluate
from worker.engine.events import Control, Interrupted
from worker.engine.runtime import Runtime
from worker.engine.trainer import Resume

NUM_VAL = 9
"""Odd: the last of two ranks has one image less."""
CANCELLED_AT, RELEASED_AT, STOPPED_AT = 4, 12, 3
"""Looks; the second lies within the second epoch."""
SPEC = tiny_spec(
    optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9},
    augment=[{"name": "random_crop", "padding": 1}, "horizontal_flip"],
    ema_decay=0.9,
    log_every_steps=2,
)
RUNTIME = Runtime(device="cpu", precision="fp32", num_threads=1, num_processes=2)


def whole_batch() -> torch.Tensor:
    """Activations float32 [8, 3, 4, 4] of both ranks, whose halves differ in mean and spread."""
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x * torch.arange(1.0, 9).view(8, 1, 1, 1) + torch.arange(3.0).view(1, 3, 1, 1)


def direction() -> torch.Tensor:
    """What a loss weights the normalized activations by."""
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def normalize(norm: nn.BatchNorm2d, rows: slice) -> dict[str, torch.Tensor]:
    """Forward and backward of these rows of the batch, by a norm with weights of its own."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, -1.0, 3.0]))
    x = whole_batch()[rows].requires_grad_()
    y = norm(x)
    (y.square() * direction()[rows]).sum().backward()
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    results = {"y": y.detach(), **{name: g for name, g in gradients.items() if g is not None}}
    return results | {f"running.{name}": value for name, value in norm.named_buffers()}


def evaluated(ranks: Ranks) -> dict[str, torch.Tensor]:
    """The columns of an evaluation of the network before its training."""
    cpu = torch.device("cpu")
    evaluation = evaluate(
        tiny_model(SPEC),
        DeviceData(colored(NUM_VAL, seed=2), cpu),
        Normalizer(PREPROCESSING, cpu),
        RUNTIME,
        batch_size=2,
        before_batch=lambda done, total: None,
        ranks=ranks,
    )
    columns = {
        "labels": evaluation.labels,
        "predicted": evaluation.predicted,
        "losses": evaluation.losses,
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def as_document(run: Run) -> dict[str, Any]:
    return {
        "points": run.sink.reproducible_points(),
        "weights": dict(run.weights),
        "stored": dict(run.sink.checkpoints[-1].weights),
        "step": run.result.step,
    }


def interrupted(control: Control, ranks: Ranks) -> tuple[Recorder, int]:
    """The sink of a run that was asked to end, and the number of steps that it did."""
    sink, model = Recorder(), tiny_model(SPEC)
    try:
        run_fit(
            SPEC,
            model=model,
            sink=sink,
            control=control,
            ranks=ranks,
            num_val=NUM_VAL,
            runtime=RUNTIME,
        )
    except Interrupted as error:
        sink.events.append(type(error).__name__)
    return sink, int(model.state_dict()["1.num_batches_tracked"])


def work(rank: int, folder: str) -> None:
    """All that the tests ask about, in one life of the processes; left in a file for each."""
    warnings.simplefilter("error")  # as in the process of the tests
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = (Path(folder) / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    both = {"ranks": ranks, "num_val": NUM_VAL, "runtime": RUNTIME}
    half = slice(4 * rank, 4 * rank + 4)
    results: dict[str, Any] = {
        "norm": normalize(SyncedBatchNorm2d(3), half),
        "evaluated": evaluated(ranks),
        "fit": as_document(run_fit(SPEC, **both)),
    }
    # Only the first rank is asked; the other one has to hear of it.
    asked = ReleaseAt(CANCELLED_AT, "cancel") if rank == 0 else Control()
    cancelled, num_steps = interrupted(asked, ranks)
    results["cancelled"] = {"events": cancelled.events, "num_steps": num_steps}
    asked = ReleaseAt(RELEASED_AT) if rank == 0 else Control()
    released, num_steps = interrupted(asked, ranks)
    last = released.checkpoints[-1]
    resume = Resume(last.weights, last.resume)
    results["released"] = {"events": list(released.events), "num_steps": num_steps}
    results["resumed"] = as_document(run_fit(SPEC, sink=released, resume=resume, **both))
    asked = ReleaseAt(STOPPED_AT, "stop") if rank == 0 else Control()
    stopped = run_fit(SPEC, control=asked, **both)
    last = stopped.sink.checkpoints[-1]
    results["stopped"] = as_document(stopped) | {"reason": stopped.result.stop_reason}
    resume = Resume(last.weights, last.resume)
    results["gone on"] = as_document(run_fit(SPEC, resume=resume, **both))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()
