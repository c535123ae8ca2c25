"""Requests made up from the OpenAPI document: whatever comes, the answer is a documented one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app
from api.dependencies import OPEN_PATHS
from shared import schema as database_schema
from shared.database import Database
from shared.settings import Settings


@schemathesis.serializer("application/offset+octet-stream")
def _as_they_are(context: Any, value: Any) -> bytes:
    """Parts of uploads: bytes, or what was made up in their place."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("home")
    configured = Settings(
        _env_file=None,  # type: ignore[call-arg]
        home=home,
        database_url=SecretStr(f"sqlite:///{home / 'test.sqlite3'}"),
        dataset_roots=(Path(home),),
    )
    database = Database(configured.database)
    database_schema.migrate(database)
    database.dispose()
    app = create_app(configured)
    with TestClient(app):
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_gets_an_answer_that_is_not_documented(
    document: Any, mode: GenerationMode
) -> None:
    """Requests that fit the document, and such that do not."""
    operations = [result.ok() for result in document.get_all_operations()]
    routes = document.raw_schema["paths"].values()
    assert len(operations) == sum(len(methods) for methods in routes) > 30
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.path in OPEN_PATHS:
            continue  # Nothing can be wrong with a request that carries nothing.

        @settings(
            max_examples=20,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
