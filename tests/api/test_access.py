from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr

from api.app import create_app

KEY = "c0ffee" * 8
OPEN = {"/healthz", "/readyz"}


@pytest.fixture
def keyed(sqlite_settings: Any, start_server: Any) -> Any:
    """A server with a key, and a client that does not send it."""
    return start_server(sqlite_settings.model_copy(update={"api_key": SecretStr(KEY)}))


def calls_of(app: Any) -> Iterator[tuple[str, str]]:
    """Each method and path that the app answers, static files included."""
    for route in iter_route_contexts(app.routes):
        assert route.methods, f"{route.path} is no plain route: how is it protected?"
        for method in route.methods:
            yield method, re.sub(r"\{.*?\}", "swagger-ui.css", route.path)


def test_every_route_but_the_two_probes_wants_the_key(
    keyed: Any, assert_problem: Callable[..., Any]
) -> None:
    calls = list(calls_of(keyed.server._app))
    assert {("POST", "/predict"), ("GET", "/docs"), ("GET", "/openapi.json")} < set(calls)
    assert ("GET", "/docs/swagger-ui.css") in calls
    for method, path in calls:
        response = keyed.request(method, path)
        if path in OPEN:
            assert response.status_code == 200, path
            continue
        if method == "HEAD":  # An answer without a body.
            assert response.status_code == 401, path
        else:
            assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
        "Bearer",
        "Bearer \xe9\xff",
    ],
)
def test_a_wrong_key_opens_nothing(
    keyed: Any, header: str, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Authorization": header.encode("latin-1")}
    assert_problem(keyed.get("/jobs", headers=headers), 401, "unauthorized")


def test_the_key_opens_every_door(keyed: Any) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/jobs", "/datasets", "/architectures", "/docs", "/openapi.json"):
        assert keyed.get(path, headers=headers).status_code == 200


def test_a_body_is_not_read_before_the_key_is_checked(
    keyed: Any, assert_problem: Callable[..., Any]
) -> None:
    """Not even to say what is wrong with it."""
    assert_problem(keyed.post("/jobs", content=b"{" * 2_000_000), 401, "unauthorized")


def test_without_a_key_configured_nothing_is_asked_for(sqlite_api: Any) -> None:
    assert sqlite_api.get("/jobs").status_code == 200


def test_the_document_says_which_routes_want_the_key(sqlite_settings: Any) -> None:
    from api import openapi

    document = openapi.build(create_app(sqlite_settings))
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path in OPEN else [{"HTTPBearer": []}])
            assert ("401" in operation["responses"]) == (path not in OPEN)
