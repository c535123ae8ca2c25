"""From `POST /jobs` to the first training step, and where the time goes.

Once with a warm trainer, as by default, and once with a process that imports torch only when the
job is there. The dataset is brought in and packed beforehand, then the same again on a service
that has never seen it.

    python -m benchmarks.first_step
"""

from __future__ import annotations

import time
from datetime import datetime

from benchmarks.embedded import embedded_service
from skipline import Skipline

SPEC = {
    "kind": "train",
    "dataset": "digits",
    "augment": ["random_crop"],
    "epochs": 1,
    "batch_size": 64,
    "log_every_steps": 1,
}
LIMIT_SECONDS = 6.0
IDLE_SECONDS = 12.0
"""Until a service that has just started has nothing left to import."""


def measure(client: Skipline) -> dict[str, float]:
    """Seconds since the post: the claim, and the end of the first step."""
    posted = time.time()
    job = client.submit(SPEC)
    first: datetime | None = None
    for event in client.stream_metrics(job.id):
        if getattr(event, "name", None) == "train_loss":
            first = event.time  # type: ignore[union-attr]
            break
    claimed = client.job(job.id).started_at
    assert first is not None
    assert claimed is not None
    client.cancel(job.id)
    client.wait(job.id)
    return {"claimed": claimed.timestamp() - posted, "first step": first.timestamp() - posted}


def main() -> None:
    slowest = 0.0
    print(
        f"{'trainer':8} {'dataset':12} {'claimed':>9} {'first step':>11}   seconds after the post"
    )
    for warm in ("1", "0"):
        with embedded_service(SKIPLINE_WARM_TRAINERS=warm) as client:
            time.sleep(IDLE_SECONDS)
            for dataset in ("never seen", "packed"):
                times = measure(client)
                time.sleep(IDLE_SECONDS)
                slowest = max(slowest, times["first step"])
                name = "warm" if warm == "1" else "cold"
                print(f"{name:8} {dataset:12} {times['claimed']:9.2f} {times['first step']:11.2f}")
    print(f"the slowest took {slowest:.1f} s; the limit is {LIMIT_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
