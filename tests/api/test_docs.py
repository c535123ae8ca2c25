from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from api import examples, openapi
from api.app import create_app
from api.ingests import parse_ingest
from skipline import schemas
from skipline.specs import parse_request


@pytest.fixture(scope="module")
def document(sqlite_settings: Any) -> Any:
    return openapi.build(create_app(sqlite_settings))


def test_the_page_loads_only_what_this_server_has(sqlite_api: Any) -> None:
    page = sqlite_api.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'self';" in policy
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 4
    for path in loaded:
        response = sqlite_api.get(path)
        assert (response.status_code, response.headers["x-content-type-options"]) == (
            200,
            "nosniff",
        )
        assert len(response.content) > 50
    assert "<script>" not in page.text, "the policy allows no script within the page"
    assert "/openapi.json" in sqlite_api.get("/docs/start.js").text


def test_the_vendored_page_understands_the_documents_version(
    sqlite_api: Any, document: Any
) -> None:
    assert document["openapi"].startswith("3.1.")
    assert "isOAS31" in sqlite_api.get("/docs/swagger-ui-bundle.js").text
    assert sqlite_api.get("/openapi.json").json() == document


def test_every_body_has_an_example(document: Any) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            bodies = [operation["requestBody"]] if "requestBody" in operation else []
            responses = operation["responses"].items()
            answers = [answer for status, answer in responses if status != "204"]
            for body in bodies + answers:
                for content in body.get("content", {}).values():
                    assert "example" in content or "examples" in content, (method, path)
                    assert "schema" in content, (method, path)


def test_every_error_is_documented_as_a_problem(document: Any) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and (path, status) != ("/readyz", "503"):
                    assert list(answer["content"]) == ["application/problem+json"], (path, status)


def test_no_reference_leads_nowhere(document: Any) -> None:
    names = set(re.findall(r"#/components/schemas/([\w.-]+)", str(document)))
    assert names <= set(document["components"]["schemas"])
    assert "$defs" not in str(document)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (schemas.Job, examples.TRAIN_JOB),
        (schemas.Job, examples.INGEST_JOB),
        (schemas.Job, examples.CANCELLED_JOB),
        (schemas.Job, examples.PAUSING_JOB),
        (schemas.Job, examples.RESUMED_JOB),
        (schemas.Job, examples.STOPPING_JOB),
        (schemas.Job, examples.RETRY_JOB),
        (schemas.Page[schemas.Job], examples.JOBS),
        (schemas.Metrics, examples.METRICS),
        (schemas.Page[schemas.Checkpoint], examples.CHECKPOINTS),
        (schemas.Report, examples.REPORT),
        (schemas.Summary, examples.SUMMARY),
        (schemas.Page[schemas.Event], examples.EVENTS),
        (schemas.Page[schemas.Attempt], examples.ATTEMPTS),
        (schemas.Page[schemas.Worker], examples.WORKERS),
        (schemas.Page[schemas.Recipe], examples.RECIPES),
        (schemas.Dataset, examples.DATASET),
        (schemas.DatasetPage, examples.DATASETS),
        (schemas.Page[schemas.Architecture], examples.ARCHITECTURES),
        (schemas.Predictions, examples.PREDICTIONS),
        (schemas.Readiness, examples.READY),
        (schemas.Readiness, examples.NOT_READY),
        *((schemas.ProblemDocument, example) for example in examples.PROBLEMS.values()),
    ],
)
def test_an_example_is_what_the_service_would_answer(
    model: type[BaseModel], example: dict[str, Any]
) -> None:
    assert model.model_validate(example).model_dump(mode="json") == example


def test_the_examples_of_requests_are_accepted() -> None:
    for example in examples.JOB_REQUESTS.values():
        parse_request(example)
    for example in examples.INGEST_REQUESTS.values():
        parse_ingest(example)
