"""The commands that run a server: up, api, worker, migrate, doctor.

The only file of this package that may import the server's packages, and only inside functions:
the base install has the client without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from shared.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_RESTARTS = 5
"""Within `RESTART_WINDOW_SECONDS`, before `up` gives up on a process that keeps ending."""
RESTART_WINDOW_SECONDS = 60.0
LOW_DISK_BYTES = 2 * 2**30

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
Role = Annotated[
    Literal["all", "predict"], typer.Option(help="Serve everything, or nothing but predictions.")
]
Slots = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Jobs at once; by default one for each GPU, else one."),
]


def register(app: typer.Typer) -> None:
    """Adds the server's commands to the command line."""
    for command in (up, api, worker, migrate, doctor):
        app.command(rich_help_panel="Server")(command)


def check(
    path: Annotated[Path, typer.Argument(exists=True, help="A folder or archive of images.")],
    val_fraction: Annotated[
        float | None, typer.Option(help="Hold out this share of train as val, class by class.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses what is held out.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is wrong with a folder or an archive of images, without a server. Exit code 1 if it
    could not be trained on."""
    from skipline.cli.datasets import problem_table
    from skipline.cli.output import format_bytes, stdout

    with setup_errors():
        from shared.settings import get_settings
        from worker.datasets.check_path import check_dataset

        settings = get_settings()
    record, problems = check_dataset(path, settings, val_fraction=val_fraction, seed=seed)
    if json_output:
        found = [problem.model_dump() for problem in problems]
        facts = None
        if record is not None:
            facts = {
                "hash": record.hash,
                "classes": record.classes,
                "splits": {name: split.model_dump() for name, split in record.splits.items()},
                "image_size": record.image_size,
                "channel_mean": record.channel_mean,
                "channel_std": record.channel_std,
                "image_sizes": record.image_sizes.model_dump(),
            }
        typer.echo(json.dumps({"dataset": facts, "problems": found}, indent=2, ensure_ascii=False))
    else:
        console = stdout()
        if record is not None:
            counts = ", ".join(
                f"{split.num_images:,} images in {name}" for name, split in record.splits.items()
            )
            sizes = record.image_sizes
            console.print(f"{record.num_classes:,} classes: {counts}")
            console.print(
                f"{sizes.width.min} to {sizes.width.max} px wide, "
                f"{sizes.height.min} to {sizes.height.max} px high, "
                f"{format_bytes(sizes.file_bytes.median)} in the middle"
            )
        console.print(problem_table(problems) if problems else "Nothing is wrong.")
    raise typer.Exit(0 if record is not None else 1)


def fail(message: str) -> NoReturn:
    """One line that says what is wrong and what to do; exit code 1."""
    stderr.print(f"[red]error:[/red] {message}")
    raise typer.Exit(1)


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """Turns what is wrong with the set-up into one line and exit code 1."""
    try:
        import celery
        import fastapi
    except ImportError:
        fail("the server's libraries are not installed: pip install 'skipline[server]'")
    del celery, fastapi
    from pydantic import ValidationError

    from shared.errors import SetupError

    try:
        yield
    except SetupError as error:
        fail(str(error))
    except ValidationError as error:
        wrong = error.errors()[0]
        fail(f"SKIPLINE_{str(wrong['loc'][0]).upper()}: {wrong['msg']}")


def load_settings() -> Settings:
    """The settings of this process, once they were found to be usable."""
    from shared import logs
    from shared.errors import SetupError
    from shared.settings import get_settings

    settings = get_settings()
    logs.configure(settings)
    # Threads of torch that spin while they wait take the cores from each other as soon as there
    # are more of them than cores: training beside a busy service was five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        settings.home_path.mkdir(parents=True, exist_ok=True)
        probe = settings.home_path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"The folder {settings.home_path} cannot be written ({error.strerror}): "
            "set SKIPLINE_HOME to one that can"
        ) from None
    try:
        _ = settings.artifacts_path
    except ValueError as error:
        raise SetupError(str(error)) from None
    return settings


def check_address(settings: Settings, host: str, port: int) -> None:
    """Raises `SetupError` for an open door without a key, and for an address that cannot be
    listened on."""
    from shared.errors import SetupError

    if host not in LOOPBACK and settings.api_key is None:
        raise SetupError(
            f"Listening on {host} would let anybody in: set SKIPLINE_API_KEY to a long secret "
            "first, or listen on 127.0.0.1"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SetupError(
            f"Cannot listen on {host} port {port} ({error.strerror}): choose another with --port, "
            "or stop what listens there"
        ) from None


def api(host: Host = "127.0.0.1", port: Port = 8000, role: Role = "all") -> None:
    """Runs the HTTP service alone."""
    with setup_errors():
        from api.server import serve
        from shared import schema
        from shared.database import Database

        settings = load_settings()
        check_address(settings, host, port)
        database = Database(settings.database)
        schema.check(database)
        database.dispose()
        end_with_parent()
        serve(settings, host, port, role)


def num_slots(slots: int | None, settings: Settings) -> int:
    """As many as were asked for, else as the machine has GPUs, but at least one."""
    from shared.settings import num_gpus

    return slots or max(1, num_gpus(settings))


def worker(slots: Slots = None) -> None:
    """Runs a worker that takes jobs from the queue."""
    with setup_errors():
        from worker.app import run

        settings = load_settings()
        end_with_parent()
        run(settings, num_slots(slots, settings))


def migrate() -> None:
    """Brings the database to the newest schema."""
    with setup_errors():
        from shared import schema
        from shared.database import Database

        settings = load_settings()
        schema.migrate(Database(settings.database))
    typer.echo("The database has the newest schema.")


def end_with_parent() -> None:
    """When `skipline up` is gone, this process leaves as if it had been asked to."""
    from shared import lifeline

    def leave() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(lifeline.ENVIRONMENT, None):
        lifeline.watch(sys.stdin.fileno(), lambda line: None, leave)


def up(host: Host = "127.0.0.1", port: Port = 8000, slots: Slots = None) -> None:
    """Starts everything on this machine: database, API and one worker. Ctrl-C stops it; jobs go
    on at the next start."""
    with setup_errors():
        from shared import schema
        from shared.database import Database

        settings = load_settings()
        check_address(settings, host, port)
        database = Database(settings.database)
        schema.migrate(database)
        database.dispose()
        children = [
            Child("api", ["api", "--host", host, "--port", str(port)]),
            Child("worker", ["worker", "--slots", str(num_slots(slots, settings))]),
        ]
        shown = f"[{host}]" if ":" in host else host
        stderr.print(f"Skipline is starting on [bold]http://{shown}:{port}[/bold]")
        stderr.print(f"  docs  http://{shown}:{port}/docs")
        stderr.print(f"  home  {settings.home_path}")
        stderr.print("Ctrl-C stops it; unfinished jobs go on at the next start.")
        raise typer.Exit(run_children(children, settings.grace_seconds + 10))


@dataclass
class Child:
    """A process of the service that `up` keeps running."""

    name: str
    arguments: list[str]

    def __post_init__(self) -> None:
        self._ends: list[float] = []
        self.start()

    def start(self) -> None:
        from shared import lifeline

        self.process = lifeline.start([sys.executable, "-m", "skipline", *self.arguments])

    def restart_if_ended(self) -> bool:
        """False when it has ended too often to go on."""
        code = self.process.poll()
        if code is None:
            return True
        now = time.monotonic()
        self._ends = [end for end in self._ends if now - end < RESTART_WINDOW_SECONDS] + [now]
        if len(self._ends) >= MAX_RESTARTS:
            stderr.print(f"[red]error:[/red] the {self.name} keeps ending (exit code {code})")
            return False
        stderr.print(f"the {self.name} ended (exit code {code}): starting it again")
        self.start()
        return True


def run_children(children: list[Child], patience_seconds: float) -> int:
    """Keeps the children running until a signal asks to stop; returns the exit code."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask)
    healthy = True
    while healthy and not asked:
        time.sleep(0.2)
        # A list, so that every child is looked at.
        healthy = False not in [child.restart_if_ended() for child in children]
    stderr.print("Stopping: running jobs write a checkpoint first.")
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + patience_seconds
    for child in children:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
    return 0 if healthy else 1


@dataclass(frozen=True)
class Check:
    """One line of the doctor's. `ok` is None for what is worth knowing and cannot be wrong."""

    name: str
    ok: bool | None
    detail: str


def doctor(json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Says what this machine can do and whether database, broker and storage answer."""
    with setup_errors():
        from shared.settings import get_settings

        settings = get_settings()
        checks = [run_check(name, check) for name, check in doctor_checks(settings)]
    shown = shown_settings(settings)
    if json_output:
        typer.echo(json.dumps({"checks": [asdict(check) for check in checks], "settings": shown}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        marks = {True: "[green]ok[/green]  ", False: "[red]wrong[/red]", None: "    "}
        for check in checks:
            console.print(f"{marks[check.ok]:5} {check.name:10} {check.detail}")
        console.print()
        for name, value in shown.items():
            console.print(f"{name}={value}", style="dim", markup=False)
    raise typer.Exit(1 if any(check.ok is False for check in checks) else 0)


def run_check(name: str, check: Callable[[], str]) -> Check:
    """The check's answer, or what it stumbled over."""
    try:
        return Check(name, True, check())
    except Exception as error:
        return Check(name, False, str(error) or type(error).__name__)


def doctor_checks(settings: Settings) -> Iterator[tuple[str, Callable[[], str]]]:
    """What the doctor looks at. A check returns what it found, or raises."""

    def python() -> str:
        return f"{sys.version.split()[0]} on {sys.platform}"

    def torch_() -> str:
        import torch
        import torchvision

        return f"torch {torch.__version__}, torchvision {torchvision.__version__}"

    def devices() -> str:
        import torch

        from shared.settings import num_cores

        found = [f"{num_cores()} CPU cores"]
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
        return ", ".join(found)

    def database() -> str:
        from shared import schema
        from shared.database import Database

        schema.check(Database(settings.database))
        return "answers, with the newest schema"

    def broker() -> str:
        from shared.dispatch import Bell

        Bell(settings).check()
        return "files below the home folder" if settings.broker_url is None else "answers"

    def storage() -> str:
        from shared.storage import Storage

        Storage(settings.artifacts_path).check()
        return str(settings.artifacts_path)

    def disk() -> str:
        free = shutil.disk_usage(settings.home_path).free
        if free < LOW_DISK_BYTES:
            raise OSError(f"only {free / 2**30:.1f} GiB are free below {settings.home_path}")
        return f"{free / 2**30:.0f} GiB free"

    yield from {
        "python": python,
        "torch": torch_,
        "devices": devices,
        "database": database,
        "broker": broker,
        "storage": storage,
        "disk": disk,
    }.items()


def shown_settings(settings: Settings) -> dict[str, str]:
    """Every setting under its variable's name, secrets and passwords in URLs hidden."""
    shown = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name == "dataset_roots":
            value = ":".join(map(str, settings.resolved_dataset_roots))
        shown[f"SKIPLINE_{name.upper()}"] = "" if value is None else str(value)
    return shown
