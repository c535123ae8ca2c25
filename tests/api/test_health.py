from __future__ import annotations

import shutil
import threading
from typing import Any

import pytest
from pydantic import SecretStr

from api import checks


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
