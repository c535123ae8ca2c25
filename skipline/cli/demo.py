"""`skipline demo`: the whole way once, from nothing to a prediction, on this machine.

Starts the embedded service (unless one answers already), trains, evaluates, predicts, draws the
curves, and stops what it started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import IO, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from skipline.cli.output import exit_unless_succeeded, format_duration, format_percent, stdout
from skipline.cli.plot import plot_metrics
from skipline.cli.predict import render_predictions
from skipline.cli.report import render_report
from skipline.cli.watch import watch
from skipline.client import Skipline, SkiplineError
from skipline.schemas import Job

DEMO_SPEC: dict[str, Any] = {
    "kind": "train",
    "name": "demo",
    "dataset": "digits",
    "model": {"arch": "resnet18"},
    "image_size": 16,
    "augment": ["random_crop"],
    "val_fraction": 0.1,
    "epochs": 6,
    "batch_size": 32,
    "optimizer": {"name": "sgd", "lr": 0.02},
    "log_every_steps": 10,
}
MIN_TOP1 = 0.97
"""Less than that on the held-out digits means that something is broken."""
PLOT_PATH = Path("skipline-demo.png")
SAMPLE_DIGIT = 7
START_SECONDS = 60.0
STOP_SECONDS = 40.0
LOG_LINES_SHOWN = 15


def demo() -> None:
    """Train, evaluate and predict on real images, in about a minute."""
    with _sigterm_as_interrupt():
        try:
            top1 = run_demo(stdout())
        except KeyboardInterrupt:
            stdout().print("Interrupted; nothing is left running.")
            raise typer.Exit(130) from None
    if top1 < MIN_TOP1:
        found, wanted = format_percent(top1), format_percent(MIN_TOP1)
        raise SkiplineError(f"top-1 is {found}, below {wanted}", code="demo_too_inaccurate")


def run_demo(console: Console) -> float:
    """Goes the whole way and returns the top-1 on the held-out digits.

    Raises:
        SkiplineError: the service does not start, or refuses something.
        typer.Exit: a job of the demo failed.
    """
    sample = held_out_digit(SAMPLE_DIGIT)
    begun = time.monotonic()
    with _service(console) as (client, is_own):
        _say(console, "Train", "a ResNet-18 on handwritten digits (UCI, 1,797 images)")
        training = _run_job(client, client.submit(DEMO_SPEC))
        _say(console, "Evaluate", "on the digits that were held out")
        request = {"kind": "evaluate", "model": training.id, "dataset": "digits", "split": "test"}
        evaluation = _run_job(client, client.submit(request))
        report = client.report(evaluation.id)
        console.print(render_report(report))
        _say(console, "Predict", f"a {SAMPLE_DIGIT} that it has never seen")
        console.print(render_predictions(client.predict(sample, model=training.id, top_k=3)))
        plot_metrics(client.metrics(training.id), PLOT_PATH, title="ResNet-18 on digits")
        _say(console, "Done", f"in {format_duration(time.monotonic() - begun)}")
        _print_how_to_go_on(console, client, training, is_own)
    return report.top1


def _say(console: Console, what: str, rest: str) -> None:
    console.print()
    title = Rule(Text.assemble((what, "bold"), f" {rest}"), align="left", style="dim")
    console.print(title, width=min(80, console.width))


def _run_job(client: Skipline, job: Job) -> Job:
    """Watches a job to its end; gives it up when the demo is interrupted."""
    try:
        job = watch(client, job)
    except BaseException:
        with suppress(SkiplineError):
            client.cancel(job.id)
        raise
    exit_unless_succeeded(job)
    return job


def _print_how_to_go_on(console: Console, client: Skipline, training: Job, is_own: bool) -> None:
    console.print(f"The curves are in {PLOT_PATH}. Go on with:")
    console.print()
    url = "http://127.0.0.1:8000" if is_own else client.url
    steps = [
        ("skipline train --dataset digits --arch resnet34 --watch", "train another"),
        ("skipline datasets add PATH", "bring in your images, in class folders"),
        (f"skipline predict IMAGE --model {training.id}", "ask the demo's model"),
        (f"{url}/docs", "the HTTP interface"),
    ]
    if is_own:
        steps.insert(0, ("skipline up", "start the service, and leave it running"))
    width = max(len(step) for step, _ in steps)
    for step, what in steps:
        console.print(Text.assemble(f"  {step:<{width}}   ", (what, "dim")), soft_wrap=True)


def held_out_digit(digit: int) -> bytes:
    """A PNG (8x8, grey) of a digit from the test split: every fifth image of each class."""
    try:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SkiplineError(
            f"The demo runs the service, and {error.name} is missing: "
            "pip install 'skipline[server]'",
            code="missing_server",
        ) from None
    digits = load_digits()
    place = np.flatnonzero(digits.target == digit)[4]
    pixels = np.rint(digits.images[place] * (255 / 16)).astype(np.uint8)
    png = BytesIO()
    Image.fromarray(pixels).save(png, format="PNG")
    return png.getvalue()


@contextmanager
def _service(console: Console) -> Iterator[tuple[Skipline, bool]]:
    """A client of the service that runs already, else of one that runs as long as this lasts."""
    with Skipline() as client:
        if _is_ready(client):
            console.print(f"Using the service at {client.url}.")
            yield client, False
            return
    with (
        TemporaryFile() as log,
        _process(log) as (process, port),
        Skipline(f"http://127.0.0.1:{port}") as client,
    ):
        _await_ready(console, client, process, log)
        yield client, True


def _is_ready(client: Skipline) -> bool:
    try:
        return client.ready().status == "ready"
    except SkiplineError:
        return False


@contextmanager
def _process(log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`skipline up` on a free port, in a session of its own so that Ctrl-C reaches only us."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "skipline", "up", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process, port
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the service to end, which stops its workers too; ends it by force if it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_ready(
    console: Console, client: Skipline, process: subprocess.Popen[bytes], log: IO[bytes]
) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < START_SECONDS:
        if process.poll() is not None:
            raise _start_error(f"ended with exit code {process.returncode}", log)
        if _is_ready(client):
            seconds = format_duration(time.monotonic() - begun)
            console.print(f"The service is ready at {client.url} after {seconds}.")
            return
        time.sleep(0.1)
    raise _start_error(f"was not ready within {START_SECONDS:.0f} s", log)


def _start_error(what: str, log: IO[bytes]) -> SkiplineError:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    said = "\n".join(["Its last lines:", *(f"  {line}" for line in lines)]) if lines else ""
    return SkiplineError(f"The service {what}. {said}", code="service_did_not_start")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A `kill` of the demo is an interrupt too, so that it stops the service on its way out."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
