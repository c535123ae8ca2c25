"""`skipline workers`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from skipline.cli.output import JsonOption, format_age, format_bytes, make_table, print_json, stdout
from skipline.client import Skipline
from skipline.schemas import Page, Worker, WorkerDevice

STATUS_STYLES = {"active": "green", "draining": "yellow", "lost": "red"}


def workers(as_json: JsonOption = False) -> None:
    """List the workers: what they have, and what runs on them."""
    with Skipline() as client:
        found = client.workers()
    if as_json:
        print_json(Page[Worker](items=found, next=None))
    elif found:
        stdout().print(_table(found))
    else:
        stdout().print("No worker was seen within the last hour. Start one: skipline worker")


def _table(found: list[Worker]) -> Table:
    table = make_table("host", "status", ">slots", "~devices", "running", "seen")
    for worker in found:
        table.add_row(
            worker.host,
            Text(worker.status, style=STATUS_STYLES[worker.status]),
            f"{len(worker.job_ids)}/{worker.num_slots}",
            "\n".join(_device(worker, device) for device in worker.devices) or "-",
            "\n".join(worker.job_ids) or "-",
            format_age(worker.seen_at),
        )
    return table


def _device(worker: Worker, device: WorkerDevice) -> str:
    """`GPU 0: NVIDIA H100, 79.6 GiB, job 0a1b`, or `CPU: AMD EPYC, 16 cores, 125.0 GiB`."""
    parts = [device.name]
    if device.type == "cpu":
        parts.append(f"{worker.num_cores} cores")
    if device.memory_bytes is not None:
        parts.append(format_bytes(device.memory_bytes))
    if device.type == "cuda":
        parts.append(f"job {device.job_id}" if device.job_id else "free")
    place = "CPU" if device.type == "cpu" else f"GPU {device.index}"
    return f"{place}: {', '.join(parts)}"
