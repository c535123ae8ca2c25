"""The parts of the OpenAPI document that FastAPI cannot know: bodies that are read by
`api.bodies`, an example for each, and the problem documents."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from api import examples
from api import problems as problem_documents
from api.dependencies import OPEN_PATHS
from skipline.schemas import ProblemDocument
from skipline.specs import PRODUCTION

JSON = "application/json"
PNG = "image/png"
TEXT = "text/plain"
MARKDOWN = "text/markdown"
REF = "#/components/schemas/{model}"
COMMON_PROBLEMS = (401, 500, 503)
LOCATION = {"Location": {"description": "Where it is", "schema": {"type": "string"}}}

Document = dict[str, Any]


def responses(
    example: Any,
    status: int = 200,
    model: type[BaseModel] | None = None,
    *,
    problems: tuple[int, ...] = (),
    location: bool = False,
    also: Mapping[str, Any] | None = None,
) -> dict[int | str, Document]:
    """What a route answers: an `example` for `status`, and which problems. `also` adds other
    content types; `model` is needed for a status that is not the route's own."""
    answer: Document = {
        "description": HTTPStatus(status).phrase,
        "content": {JSON: {"example": example}, **(also or {})},
    }
    if model is not None:
        answer["model"] = model
    if location:
        answer["headers"] = LOCATION
    return {status: answer, **{code: _problem(code) for code in problems}}


def picture(problems: tuple[int, ...]) -> dict[int | str, Document]:
    """What a route answers that sends a PNG."""
    content = {
        PNG: {"schema": {"type": "string", "format": "binary"}, "example": "(the bytes of a PNG)"}
    }
    answer = {"description": HTTPStatus.OK.phrase, "content": content}
    return {200: answer, **{code: _problem(code) for code in problems}}


def file(media_type: str, problems: tuple[int, ...]) -> dict[int | str, Document]:
    """What a route answers that sends a file, or 304 to who has it."""
    content = {
        media_type: {"schema": {"type": "string", "format": "binary"}, "example": "(its bytes)"}
    }
    answer = {"description": HTTPStatus.OK.phrase, "content": content}
    not_modified = {"description": HTTPStatus.NOT_MODIFIED.phrase}
    return {200: answer, 304: not_modified, **refusals(problems)}


def binary(media_type: str, problems: tuple[int, ...]) -> dict[int | str, Document]:
    """What a route answers that sends a file which it has just made."""
    answers = file(media_type, problems)
    del answers[304]
    return answers


def text(
    example: str, problems: tuple[int, ...], media_type: str = TEXT
) -> dict[int | str, Document]:
    """What a route answers that sends text."""
    content = {media_type: {"schema": {"type": "string"}, "example": example}}
    answer = {"description": HTTPStatus.OK.phrase, "content": content}
    return {200: answer, **{code: _problem(code) for code in problems}}


def no_content(problems: tuple[int, ...]) -> dict[int | str, Document]:
    """What a route answers that has nothing to say."""
    return {204: {"description": HTTPStatus.NO_CONTENT.phrase}, **refusals(problems)}


def refusals(problems: tuple[int, ...]) -> dict[int | str, Document]:
    """Which problems a route answers."""
    return {code: _problem(code) for code in problems}


def headers(required: Mapping[str, str], optional: Mapping[str, str] = {}) -> Document:
    """What `openapi_extra` says of headers that FastAPI does not read: numbers of bytes, and
    texts."""
    numbers = [_header(name, text, "integer", True) for name, text in required.items()]
    texts = [_header(name, text, "string", False) for name, text in optional.items()]
    return {"parameters": [*numbers, *texts]}


def _header(name: str, description: str, kind: str, required: bool) -> Document:
    bounds = {"minimum": 0, "maximum": 2**40} if kind == "integer" else {}
    return {
        "name": name,
        "in": "header",
        "required": required,
        "description": description,
        "schema": {"type": kind, **bounds},
    }


def _problem(status: int) -> Document:
    schema = {"$ref": REF.format(model=ProblemDocument.__name__)}
    content = {
        problem_documents.MEDIA_TYPE: {"schema": schema, "example": examples.PROBLEMS[status]}
    }
    return {"description": HTTPStatus(status).phrase, "content": content}


def json_body(adapter: TypeAdapter[Any], named_examples: Mapping[str, Any]) -> Document:
    """What `openapi_extra` says of a JSON body. Its definitions travel with the schema until
    `build` puts them among the components."""
    schema = adapter.json_schema(ref_template=REF)
    shown = {name: {"value": example} for name, example in named_examples.items()}
    return {
        "requestBody": {"required": True, "content": {JSON: {"schema": schema, "examples": shown}}}
    }


def ingest_body(
    adapter: TypeAdapter[Any], named_examples: Mapping[str, Any], form_example: Mapping[str, Any]
) -> Document:
    """What `openapi_extra` says of the bodies of `POST /datasets`."""
    document = json_body(adapter, named_examples)
    fields = adapter.json_schema()["properties"]
    schema = {
        "type": "object",
        "required": ["archive"],
        "additionalProperties": False,
        "properties": {
            "archive": {"type": "string", "format": "binary", "description": "zip or tar"},
            **{name: fields[name] for name in ("name", "val_fraction", "seed")},
        },
    }
    content = document["requestBody"]["content"]
    content["multipart/form-data"] = {"schema": schema, "example": dict(form_example)}
    return document


def predict_body(form_example: Mapping[str, Any], json_example: Mapping[str, Any]) -> Document:
    """What `openapi_extra` says of the bodies of `POST /predict`."""
    model = {
        "type": "string",
        "default": PRODUCTION,
        "description": "An alias, or the id of a job or of a checkpoint",
    }
    options = {
        "model": model,
        "top_k": {"type": "integer", "minimum": 1, "default": 5},
        "explain": {"type": "boolean", "default": False},
        "features": {"type": "boolean", "default": False},
    }

    def object_with(name: str, item: Document, description: str) -> Document:
        images = {"type": "array", "minItems": 1, "items": item, "description": description}
        return {
            "type": "object",
            "required": [name],
            "additionalProperties": False,
            "properties": {name: images, **options},
        }

    binary = {"type": "string", "format": "binary"}
    encoded = {"type": "string", "contentEncoding": "base64"}
    content = {
        "multipart/form-data": {
            "schema": object_with(
                "image", binary, "Image files: JPEG, PNG, BMP, WebP, GIF or TIFF"
            ),
            "example": dict(form_example),
        },
        JSON: {
            "schema": object_with("images", encoded, "Image files in Base64"),
            "example": dict(json_example),
        },
        "image/jpeg": {"schema": binary, "example": "(the bytes of an image file)"},
    }
    query = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in options.items()
    ]
    return {"parameters": query, "requestBody": {"required": True, "content": content}}


def build(app: FastAPI) -> Document:
    """The whole document."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas: Document = document["components"]["schemas"]
    schemas[ProblemDocument.__name__] = ProblemDocument.model_json_schema(ref_template=REF)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in OPEN_PATHS:
                operation["security"] = []
            body = operation.get("requestBody", {}).get("content", {})
            for content in body.values():
                schemas |= content["schema"].pop("$defs", {})
            for status in COMMON_PROBLEMS:
                if status != HTTPStatus.UNAUTHORIZED or path not in OPEN_PATHS:
                    operation["responses"].setdefault(str(status), _problem(status))
            # FastAPI's own, for parameters: here they answer a problem like everything else.
            if JSON in operation["responses"].get("422", {}).get("content", {}):
                operation["responses"]["422"] = _problem(422)
    schemas |= schemas[ProblemDocument.__name__].pop("$defs", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document
