"""What a client wants classified, from each of the bodies that `POST /predict` takes: a form, JSON
with images in Base64, or one image as it is."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from api.bodies import content_type, form_body, limited, load_json
from shared.errors import InvalidInput, UnsupportedMediaType
from shared.settings import Settings
from skipline.specs import PRODUCTION, error_items

FORM, JSON, IMAGE = "multipart/form-data", "application/json", "image/"
BodyT = TypeVar("BodyT", bound=BaseModel)


class PredictionOptions(BaseModel):
    """What is asked of the images; with a body that is an image itself, in the query."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str = PRODUCTION
    """An alias, or the id of a job or of a checkpoint."""
    top_k: Annotated[int, Field(ge=1)] = 5
    explain: bool = False
    features: bool = False


class PredictionForm(PredictionOptions):
    """The form's parts. `image`: image files, one or many."""

    image: Annotated[list[UploadFile], Field(min_length=1)]


class PredictionDocument(PredictionOptions):
    """The JSON document. `images`: image files in Base64."""

    images: Annotated[list[str], Field(min_length=1)]


@dataclass(frozen=True)
class PredictionRequest:
    """Image files with their names, and what is asked of them."""

    names: list[str]
    files: list[BinaryIO]
    options: PredictionOptions


@asynccontextmanager
async def read_request(request: Request) -> AsyncIterator[PredictionRequest]:
    """The request, whose files are gone when the block ends.

    Raises:
        UnsupportedMediaType, MalformedBody, MalformedJson, BodyTooLarge: the body cannot be read.
        InvalidInput: it makes no sense; `errors` names the keys.
    """
    settings: Settings = request.app.state.settings
    kind = content_type(request)
    if kind == FORM:
        async with form_body(request, settings.max_predict_images) as parts:
            given: dict[str, Any] = {name: parts[name] for name in parts if name != "image"}
            if "image" in parts:
                given["image"] = parts.getlist("image")
            form = _checked(PredictionForm, given)
            names = [upload.filename or str(place) for place, upload in enumerate(form.image)]
            yield PredictionRequest(names, [upload.file for upload in form.image], form)
    elif kind == JSON:
        body = await limited(request, settings.max_body_bytes).body()
        document = _checked(PredictionDocument, load_json(body))
        if len(document.images) > settings.max_predict_images:
            raise _invalid("images", f"Send at most {settings.max_predict_images} images at once")
        files = await run_in_threadpool(_decoded, document.images)
        yield PredictionRequest([str(place) for place in range(len(files))], files, document)
    elif kind.startswith(IMAGE):
        options = _checked(PredictionOptions, dict(request.query_params))
        body = await limited(request, settings.max_body_bytes).body()
        yield PredictionRequest(["0"], [BytesIO(body)], options)
    else:
        raise UnsupportedMediaType(
            f"Send Content-Type: {FORM}, {JSON}, or that of an image, as image/jpeg"
        )


def _checked(kind: type[BodyT], given: Any) -> BodyT:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        items = error_items(error)
        detail = "; ".join(f"{item['loc']}: {item['message']}" for item in items)
        raise InvalidInput(detail, errors=items) from None


def _decoded(images: list[str]) -> list[BinaryIO]:
    files: list[BinaryIO] = []
    for place, text in enumerate(images):
        try:
            files.append(BytesIO(base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError):
            raise _invalid(f"images[{place}]", "This is not Base64") from None
    return files


def _invalid(loc: str, message: str) -> InvalidInput:
    return InvalidInput(message, errors=[{"loc": loc, "message": message}])
