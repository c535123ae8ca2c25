from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from api import checks
from shared.vision.predictor import Predictor


def test_a_live_process_says_so_without_touching_anything(
    api: Any, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*args: Any) -> None:
        raise AssertionError("healthz asked for something")

    monkeypatch.setattr(api.server._app.state.services.database, "read_scope", touched)
    response = api.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_a_service_whose_parts_answer_is_ready(
    settings: Any, database: Any, start_server: Any, broker_url: str | None
) -> None:
    url = SecretStr(broker_url) if broker_url else None
    api = start_server(settings.model_copy(update={"broker_url": url}))
    response = api.get("/readyz")
    assert response.status_code == 200
    parts = {"database": "ok", "broker": "ok", "storage": "ok"}
    assert response.json() == {"status": "ready", "checks": parts}


@pytest.mark.parametrize("part", ["database", "broker", "storage"])
def test_the_part_that_is_away_is_named_without_its_address(
    sqlite_settings: Any, start_server: Any, part: str, tmp_path: Any
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "database": {"database_url": SecretStr("postgresql://a:secret@127.0.0.1:1/b")},
        "broker": {"broker_url": SecretStr("redis://:secret@127.0.0.1:1/0")},
        "storage": {"artifacts_url": f"file://{tmp_path}/secret"},
    }
    api = start_server(sqlite_settings.model_copy(update=changes[part]))
    if part == "storage":
        shutil.rmtree(tmp_path / "secret")
    response = api.get("/readyz")
    assert response.status_code == 503
    document = response.json()
    assert document["status"] == "not_ready"
    failed = {name for name, found in document["checks"].items() if found != "ok"}
    assert failed == {part}
    assert "secret" not in response.text
    assert api.get("/healthz").status_code == 200


def test_a_part_that_hangs_is_given_up_on(
    sqlite_settings: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(checks, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr("shared.storage.Storage.check", lambda self: released.wait(20))
    api = start_server(sqlite_settings)
    try:
        found = [api.get("/readyz").json()["checks"] for _ in range(2)]
    finally:
        released.set()
    hung = {"database": "ok", "broker": "ok", "storage": "no answer within 0.1 s"}
    assert found == [hung, hung]


def test_the_probes_answer_while_torch_is_loaded(
    sqlite_settings: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, released = threading.Event(), threading.Event()

    def slow(self: Any) -> None:
        started.set()
        released.wait(20)

    monkeypatch.setattr("api.serving.inference.Inference._run", slow)
    api = start_server(sqlite_settings)
    assert started.wait(20)
    try:
        assert api.get("/healthz").status_code == 200
        assert api.get("/readyz").status_code == 200
    finally:
        released.set()


# ------------------------------------------------------------------ a process for predictions alone


def test_it_is_ready_once_production_has_answered(
    settings: Any,
    api: Any,
    worker: Any,
    start_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., Any],
    png: Any,
) -> None:
    released = threading.Event()
    predict = Predictor.predict
    seen: list[tuple[int, ...]] = []

    def held(self: Any, images: Any) -> Any:
        seen.append(images.shape)
        assert released.wait(20)
        return predict(self, images)

    job_id = api.submit()["id"]
    worker.claim().checkpoint(10, "best", bias=[0.0] * 10)
    [checkpoint] = api.get(f"/jobs/{job_id}/checkpoints").json()["items"]
    checkpoint_id = checkpoint["id"]
    assert api.put("/models/production", json={"checkpoint_id": checkpoint_id}).status_code == 200
    monkeypatch.setattr(Predictor, "predict", held)
    alone = start_server(settings, role="predict")
    wait_for(lambda: seen, "forward")
    early = alone.get("/readyz")
    assert (early.status_code, early.json()["checks"]["model"]) == (503, "warming up")
    released.set()
    ready = wait_for(lambda: (r := alone.get("/readyz")).status_code == 200 and r, "readiness")
    assert ready.json()["checks"] == {"database": "ok", "storage": "ok", "model": "ok"}
    [loaded] = alone.get("/models/loaded").json()["items"]
    assert loaded["checkpoint_id"] == checkpoint_id
    answer = alone.predict([png()])
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["job_id"] == job_id
    assert len(seen) == 2


def test_it_is_ready_without_a_model_too(
    sqlite_settings: Any, start_server: Any, wait_for: Callable[..., Any]
) -> None:
    api = start_server(sqlite_settings, role="predict")
    wait_for(lambda: api.get("/readyz").status_code == 200, "readiness")
    assert api.get("/models/loaded").json()["items"] == []


def test_it_serves_nothing_else(sqlite_settings: Any, start_server: Any) -> None:
    api = start_server(sqlite_settings, role="predict")
    paths = set(api.get("/openapi.json").json()["paths"])
    assert paths == {"/predict", "/models/loaded", "/healthz", "/readyz", "/metrics"}
    for path in ("/jobs", "/models", "/models/production", "/datasets", "/workers"):
        assert api.get(path).status_code == 404


def test_it_needs_no_broker(
    sqlite_settings: Any, start_server: Any, wait_for: Callable[..., Any]
) -> None:
    away = {"broker_url": SecretStr("redis://:secret@127.0.0.1:1/0")}
    api = start_server(sqlite_settings.model_copy(update=away), role="predict")
    wait_for(lambda: api.get("/readyz").status_code == 200, "readiness")
