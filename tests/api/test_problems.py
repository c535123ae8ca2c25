from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from shared import repository

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"\xff\xfe\x00",
        b"1" * 5000,
        b'{"dataset": "digits"} trailing',
    ],
    ids=["empty", "cut off", "nested arrays", "nested objects", "no text", "long number", "more"],
)
def test_a_body_that_is_no_json_is_refused(
    sqlite_api: Any, body: bytes, assert_problem: Callable[..., Any]
) -> None:
    for path in ("/jobs", "/datasets"):
        assert_problem(sqlite_api.post(path, content=body, headers=JSON), 400, "malformed_json")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "a", ""]
)
def test_a_wrong_content_type_is_refused(
    sqlite_api: Any, content_type: str, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Content-Type": content_type}
    for path in ("/jobs", "/datasets", "/predict"):
        response = sqlite_api.post(path, content=b"{}", headers=headers)
        assert_problem(response, 415, "unsupported_media_type")


def test_a_content_type_may_name_its_charset(sqlite_api: Any) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = sqlite_api.post("/jobs", content=b'{"dataset": "digits"}', headers=headers)
    assert response.status_code == 202


FORM = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

FORM_END = b"\r\n--x--\r\n"


def _chunks(body: bytes) -> Iterator[bytes]:
    for first in range(0, len(body), 1000):
        yield body[first : first + 1000]


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_over_the_limit_is_refused(
    sqlite_settings: Any,
    start_server: Any,
    declared: bool,
    assert_problem: Callable[..., Any],
) -> None:
    limits = {"max_json_bytes": 10_000, "max_body_bytes": 20_000}
    api = start_server(sqlite_settings.model_copy(update=limits))

    def send(path: str, body: bytes, content_type: str) -> Any:
        content = body if declared else _chunks(body)
        return api.post(path, content=content, headers={"Content-Type": content_type})

    def send_json(size: int) -> Any:
        return send("/jobs", b" " * size, "application/json")

    def send_form(size: int) -> Any:
        body = FORM.ljust(size - len(FORM_END)) + FORM_END
        return send("/predict", body, "multipart/form-data; boundary=x")

    assert_problem(send_json(10_001), 413, "body_too_large")
    assert_problem(send_form(20_001), 413, "body_too_large")
    assert_problem(send_json(10_000), 400, "malformed_json")
    assert_problem(send_form(20_000), 404, "model_not_found")  # there is no `production` yet


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing/here", 404, "not_found"),
        ("GET", "/jobs/", 404, "not_found"),
        ("GET", "/docs/../../etc/passwd", 404, "not_found"),
        ("GET", "/docs/%2e%2e%2fapp.py", 404, "not_found"),
        ("DELETE", "/jobs", 405, "method_not_allowed"),
        ("PUT", "/predict", 405, "method_not_allowed"),
    ],
)
def test_what_does_not_exist_answers_a_problem(
    sqlite_api: Any,
    method: str,
    path: str,
    status: int,
    code: str,
    assert_problem: Callable[..., Any],
) -> None:
    response = sqlite_api.request(method, path)
    assert_problem(response, status, code)
    if status == 405:
        assert response.headers["allow"]


def test_what_nobody_foresaw_is_logged_and_says_nothing(
    sqlite_api: Any,
    monkeypatch: pytest.MonkeyPatch,
    assert_problem: Callable[..., Any],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a secret in /srv/skipline")

    monkeypatch.setattr(repository, "list_jobs", fail)
    with capture_logs(processors=[merge_contextvars]) as logged:
        response = sqlite_api.get("/jobs")
    document = assert_problem(response, 500, "internal_error")
    assert not {word for word in ("secret", "/srv", "Traceback") if word in response.text}
    request_id = response.headers["x-request-id"]
    assert request_id in document["detail"]
    [line] = logged
    assert (line["request_id"], line["path"], line["exc_info"]) == (request_id, "/jobs", True)


def test_answers_are_not_sniffed_and_open_to_no_other_origin(sqlite_api: Any) -> None:
    response = sqlite_api.get("/architectures", headers={"Origin": "https://elsewhere.example"})
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "body",
    [
        b'{"dataset": "digits", "\\ud800": 1}',
        b'{"dataset": "\\ud800"}',
        b'{"dataset": "digits", "model": {"arch": "\\ud800"}}',
        b'{"dataset": "digits", "optimizer": {"name": "\\ud800"}}',
        b'{"dataset": "digits", "' + b"k" * 100_000 + b'": 2}',
    ],
    ids=["key", "name", "choice", "variant", "endless"],
)
def test_text_that_is_no_unicode_or_endless_does_not_break_the_answer(
    sqlite_api: Any, body: bytes, assert_problem: Callable[..., Any]
) -> None:
    response = sqlite_api.post("/jobs", content=body, headers=JSON)
    assert_problem(response, 422, "invalid_spec")
    assert len(response.content) < 5000


def test_many_errors_are_cut_off(sqlite_api: Any, assert_problem: Callable[..., Any]) -> None:
    body = {"dataset": "digits"} | {f"key_{number}": 1 for number in range(1000)}
    document = assert_problem(sqlite_api.post("/jobs", json=body), 422, "invalid_spec")
    assert len(document["errors"]) == 50


def test_a_database_that_is_away_answers_503(
    sqlite_settings: Any, start_server: Any, assert_problem: Callable[..., Any]
) -> None:
    url = SecretStr("postgresql://nobody:hidden@127.0.0.1:1/nothing")
    api = start_server(sqlite_settings.model_copy(update={"database_url": url}))
    response = api.get("/jobs")
    assert_problem(response, 503, "database_unavailable")
    assert response.headers["retry-after"] == "2"
    assert "hidden" not in response.text
    assert "127.0.0.1" not in response.text
