"""How quickly `GET /jobs/{id}` answers while a job trains on the same cores.

python benchmarks/api_latency.py
"""

from __future__ import annotations

import time
from statistics import median, quantiles

from benchmarks.embedded import embedded_service
from skipline import Skipline

SPEC = {"kind": "train", "dataset": "digits", "epochs": 1000, "batch_size": 64}
NUM_REQUESTS = 400
PAUSE_SECONDS = 0.02
LIMIT_MS = 10.0


def latencies_ms(client: Skipline, job_id: str) -> list[float]:
    """One request after the other, as a page that shows the job would send them."""
    taken = []
    for _ in range(NUM_REQUESTS):
        began = time.perf_counter()
        client.job(job_id)
        taken.append(1000 * (time.perf_counter() - began))
        time.sleep(PAUSE_SECONDS)
    return taken


def main() -> None:
    with embedded_service() as client:
        job = client.submit(SPEC)
        while not client.metrics(job.id).series:
            time.sleep(0.2)
        training = latencies_ms(client, job.id)
        client.cancel(job.id)
        client.wait(job.id)
        idle = latencies_ms(client, job.id)
    print(f"{'':15} {'median':>8} {'90 %':>8}   ms")
    for name, taken in (("idle", idle), ("while training", training)):
        print(f"{name:15} {median(taken):8.1f} {quantiles(taken, n=10)[-1]:8.1f}")
    print(f"the limit is a median of {LIMIT_MS:.0f} ms while training")


if __name__ == "__main__":
    main()
