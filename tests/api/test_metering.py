from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api import metering
from shared.vision.predictor import Predictor
from skipline.schemas import JobKind, JobStatus


def samples(api: Any) -> dict[tuple[str, ...], float]:
    """Every number that `/metrics` tells, under its name and its labels' values; a text that
    Prometheus's own parser does not take fails."""
    response = api.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_jobs_and_workers_are_counted_by_kind_and_status(
    api: Any, worker: Any, database: Any
) -> None:
    for _ in range(4):
        api.submit()
    worker.claim().finish()
    worker.claim().finish(JobStatus.failed)
    worker.claim()
    counted = samples(api)
    assert counted["skipline_database_up",] == 1
    jobs = {key[1:]: value for key, value in counted.items() if key[0] == "skipline_jobs"}
    expected = {(kind.value, status.value): 0.0 for kind in JobKind for status in JobStatus}
    expected |= {
        ("train", "succeeded"): 1,
        ("train", "failed"): 1,
        ("train", "running"): 1,
        ("train", "queued"): 1,
    }
    assert jobs == expected
    assert 0 < counted["skipline_oldest_queued_job_seconds",] < 60
    workers = {key[1]: value for key, value in counted.items() if key[0] == "skipline_workers"}
    assert workers == {"active": 0, "draining": 0, "lost": 0}


def test_requests_are_counted_by_the_pattern_of_their_path(sqlite_api: Any) -> None:
    """Never by what a client wrote into it, of which there is no end."""
    before = samples(sqlite_api)
    for path in ("/jobs/one", "/jobs/two", "/invented/one", "/invented/two", "/jobs"):
        sqlite_api.get(path)
    sqlite_api.request("PROPFIND", "/jobs")
    after = samples(sqlite_api)
    name = "skipline_http_request_seconds_count"
    grown = {
        key[1:]: value - before.get(key, 0)
        for key, value in after.items()
        if key[0] == name and value != before.get(key, 0)
    }
    assert grown.pop(("GET", "/metrics", "200")) == 1
    assert grown == {
        ("GET", "/jobs/{job_id}", "404"): 2,
        ("GET", "other", "404"): 2,
        ("GET", "/jobs", "200"): 1,
        ("other", "/jobs", "405"): 1,
    }


def test_predictions_say_where_their_time_went(
    settings: Any, worker: Any, start_server: Any, png: Any
) -> None:
    api = start_server(settings)
    job_id = api.submit()["id"]
    worker.claim().checkpoint(10, "best", bias=[0.0] * 10)
    assert samples(api)["skipline_predicted_images_total",] == 0
    assert samples(api)["skipline_loaded_models",] == 0
    answers = [api.predict([png()] * number, model=job_id).json() for number in (1, 3)]
    counted = samples(api)
    assert counted["skipline_predicted_images_total",] == 4
    for phase in ("decode", "queue", "load", "forward"):
        told = sum(answer["timing_ms"][phase] for answer in answers) / 1000
        assert counted["skipline_prediction_seconds_count", phase] == 2
        assert counted["skipline_prediction_seconds_sum", phase] == pytest.approx(told, abs=1e-5)
    assert counted["skipline_loaded_models",] == 1
    [loaded] = api.get("/models/loaded").json()["items"]
    assert counted["skipline_loaded_model_bytes",] == loaded["num_bytes"]


def test_they_are_told_while_a_prediction_runs(
    settings: Any,
    worker: Any,
    start_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., Any],
    png: Any,
) -> None:
    released = threading.Event()
    predict = Predictor.predict

    def held(self: Any, images: Any) -> Any:
        assert released.wait(20)
        return predict(self, images)

    api = start_server(settings)
    job_id = api.submit()["id"]
    worker.claim().checkpoint(10, "best", bias=[0.0] * 10)
    monkeypatch.setattr(Predictor, "predict", held)
    thread = threading.Thread(target=api.predict, args=([png()],), kwargs={"model": job_id})
    thread.start()
    try:
        wait_for(lambda: samples(api)["skipline_predictions_waiting",] == 1, "prediction in work")
    finally:
        released.set()
        thread.join(20)
    wait_for(lambda: samples(api)["skipline_predictions_waiting",] == 0, "end of it")


def test_a_database_that_is_away_takes_no_other_metric_with_it(
    sqlite_settings: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"database_url": SecretStr("postgresql://a:secret@127.0.0.1:1/b")}
    api = start_server(sqlite_settings.model_copy(update=away))
    counted = samples(api)
    assert counted["skipline_database_up",] == 0
    assert counted["skipline_predictions_waiting",] == 0
    assert not any(key[0] == "skipline_jobs" for key in counted)


def test_a_database_that_hangs_is_given_up_on(
    sqlite_settings: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(metering, "DATABASE_SECONDS", 0.1)
    monkeypatch.setattr("shared.repository.census", lambda session: released.wait(20))
    api = start_server(sqlite_settings)
    try:
        found = [samples(api)["skipline_database_up",] for _ in range(2)]
    finally:
        released.set()
    assert found == [0, 0]
