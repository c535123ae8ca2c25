"""A local MLflow tracking server, as one would run it beside trainings: its process, and the calls
of its REST interface that write and read metrics. Whoever compares installs MLflow."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import cluster
from shared.repository import NewPoint

INSTALL = (
    "MLflow is left out: python -m venv mlflow-env && mlflow-env/bin/pip install mlflow "
    "psycopg2-binary, then --mlflow mlflow-env/bin/mlflow"
)
MAX_RESULTS = 25_000
"""Points that one answer of `get-history` holds at most."""
START_SECONDS = 180.0


class Tracking:
    """One run of one experiment on a tracking server."""

    def __init__(self, server: cluster.Connection) -> None:
        self._server = server
        experiment = self._ask("POST", "experiments/create", {"name": "bench"})
        run = self._ask("POST", "runs/create", {"experiment_id": experiment["experiment_id"]})
        self._run_id = run["run"]["info"]["run_id"]

    def log_batch(self, points: Sequence[NewPoint], time_ms: int) -> None:
        metrics = [
            {"key": point.name, "value": point.value, "timestamp": time_ms, "step": point.step}
            for point in points
        ]
        self._ask("POST", "runs/log-batch", {"run_id": self._run_id, "metrics": metrics})

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every point of a metric, page by page."""
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            query = {"run_id": self._run_id, "metric_key": name, "max_results": MAX_RESULTS}
            if token:
                query["page_token"] = token
            words = urllib.parse.urlencode(query)
            page = self._ask("GET", f"metrics/get-history?{words}")
            found += page.get("metrics", [])
            token = page.get("next_page_token", "")
            if not token:
                return found

    def _ask(self, method: str, call: str, document: object = None) -> Any:
        return self._server.ask(method, f"/api/2.0/mlflow/{call}", document)


@contextmanager
def tracking(command: str, kind: cluster.Kind, folder: Path) -> Iterator[Tracking]:
    """A server of one process over an empty database of the same kind and place as ours."""
    port = cluster.free_port()
    with cluster.empty_database(kind, folder) as url:
        # By its driver's name: which one is the default depends on the version of SQLAlchemy.
        store = url.replace("postgresql://", "postgresql+psycopg2://")
        words = [command, "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
        words += ["--artifacts-destination", str(folder / "mlflow"), "--port", str(port)]
        words += ["--workers", "1"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        with cluster.process(words, folder, "mlflow", environment) as running:

            def answers() -> bool:
                if running.poll() is not None:
                    raise SystemExit((folder / "mlflow.log").read_text()[-2000:])
                try:
                    with cluster.Connection(port) as probe:
                        return probe.ask_raw("GET", "/health") == b"OK"
                except OSError:
                    return False

            cluster.wait_for(answers, "MLflow", START_SECONDS)
            with cluster.Connection(port) as server:
                yield Tracking(server)
