"""How the sending of files is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from skipline.cli.output import format_bytes, print_sentence, stderr
from skipline.cli.watch import EXIT_DETACHED
from skipline.client import ServerUnreachable
from skipline.uploading import Progress as Sent
from skipline.uploading import SourceChanged

TELL_EVERY = 0.1
"""Of an upload, where there is no terminal to draw a bar on."""


@contextmanager
def shown_progress() -> Iterator[Sent]:
    """Shows how much of an upload is sent: as a bar on a terminal, as lines elsewhere. Says how to
    go on where it is broken off."""
    console = stderr()
    bar = Progress(
        TextColumn("sending"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("sending", total=None, visible=False)
    told = share = 0.0

    def show(sent: int, total: int) -> None:
        nonlocal told, share
        share = sent / total if total else 1.0
        bar.update(task, completed=sent, total=total, visible=True)
        if not console.is_terminal and (share >= told + TELL_EVERY or share == 1):
            told = share
            console.print(f"sent {share:.0%} of {format_bytes(total)}")

    try:
        if console.is_terminal:
            bar.start()
        yield show
    except (KeyboardInterrupt, ServerUnreachable) as error:
        bar.stop()
        if 0 < share < 1:
            print_sentence(
                console, f"{share:.0%} is there: run the same command again to send the rest"
            )
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(EXIT_DETACHED) from None
        raise
    except (OSError, SourceChanged) as error:
        bar.stop()
        print_sentence(console, Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(1) from None
    finally:
        bar.stop()
