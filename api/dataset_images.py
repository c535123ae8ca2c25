"""What a dataset shows: its images one by one, and pictures of them all."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import Annotated
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Header, Query, Response

from api import examples, openapi
from api.datasets import DatasetRef
from api.dependencies import PageDep, Services, ServicesDep, unknown_cursor
from shared import datasets
from shared.errors import DatasetGone, InvalidInput
from shared.images import decode_image, to_square
from shared.tables import Dataset
from skipline import plots, schemas

router = APIRouter(tags=["datasets"])

DEFAULT_SPLIT = "train"
SAMPLE_SIDE = 96
"""Pixels of an image in a grid, at most."""
MAX_SIDE = 512
IMMUTABLE = "private, max-age=31536000, immutable"
"""A dataset's id stands for its bytes."""
INERT = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": IMMUTABLE}
"""Files of clients are shown as images, or not at all."""
_MAGIC = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}

SplitQuery = Annotated[str, Query(max_length=10, description="train, val or test")]
LabelQuery = Annotated[str | None, Query(max_length=200, description="Of this class alone")]
IfNoneMatch = Annotated[str | None, Header()]


def _stored(services: Services, reference: str) -> Dataset:
    """Raises `DatasetNotFound`, `DatasetGone`."""
    with services.database.read_scope() as session:
        row = datasets.get_dataset(session, reference)
    if row.dropped_at is not None:
        raise DatasetGone("The dataset's images were deleted: bring the same ones in again")
    return row


@router.get(
    "/datasets/{dataset_id}/images",
    summary="List a dataset's images",
    responses=openapi.responses(examples.DATASET_IMAGES, problems=(404, 409, 422)),
)
def list_images(
    dataset_id: DatasetRef,
    page: PageDep,
    services: ServicesDep,
    split: SplitQuery = DEFAULT_SPLIT,
    label: LabelQuery = None,
) -> schemas.Page[schemas.DatasetImage]:
    """Class by class, in an order that follows from their files. `image_url` is the file as it was
    brought in, `thumbnail_url` a small picture of it."""
    dataset = _stored(services, dataset_id)
    opened = services.stored_datasets.open(dataset.key)
    rows = opened.rows(split, label)
    first = rows.start if page.after is None else _place(page.after, rows) + 1
    shown = range(first, min(first + page.limit, rows.stop))
    found = opened.split(split)
    items = [
        schemas.DatasetImage(
            split=split,
            index=row,
            label=opened.index.classes[found.labels[row]],
            path=found.paths[row],
            num_bytes=int(found.sizes[row]),
            image_url=f"/datasets/{quote(dataset.id)}/images/{split}/{row}",
            thumbnail_url=f"/datasets/{quote(dataset.id)}/images/{split}/{row}/thumbnail.png",
        )
        for row in shown
    ]
    next_ = str(shown[-1]) if shown and shown.stop < rows.stop else None
    return schemas.Page[schemas.DatasetImage](items=items, next=next_)


def _place(cursor: str, rows: range) -> int:
    if not (cursor.isascii() and cursor.isdecimal()) or int(cursor) not in rows:
        raise unknown_cursor()
    return int(cursor)


@router.get(
    "/datasets/{dataset_id}/images/{split}/{index}",
    summary="Read an image's file",
    response_class=Response,
    responses=openapi.file("image/*", problems=(404, 409, 422)),
)
def get_image(
    dataset_id: DatasetRef,
    split: str,
    index: int,
    services: ServicesDep,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """As it was brought in, byte for byte."""
    dataset = _stored(services, dataset_id)
    etag = f'"{dataset.id}-{split}-{index}"'
    data = services.stored_datasets.open(dataset.key).read(split, index)
    if if_none_match == etag:
        return Response(status_code=304, headers={"ETag": etag, **INERT})
    return Response(data, media_type=_media_type(data), headers={"ETag": etag, **INERT})


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    found = (kind for magic, kind in _MAGIC.items() if data.startswith(magic))
    return next(found, "application/octet-stream")


@router.get(
    "/datasets/{dataset_id}/images/{split}/{index}/thumbnail.png",
    summary="See an image",
    response_class=Response,
    responses=openapi.picture(problems=(404, 409, 413, 422, 429)),
)
async def get_thumbnail(
    dataset_id: DatasetRef,
    split: str,
    index: int,
    services: ServicesDep,
    size: Annotated[int, Query(ge=16, le=MAX_SIDE, description="Of the longer side, pixels")] = 128,
) -> Response:
    """Upright and in RGB, as training sees it before it is cut; never larger than the image."""
    work = partial(_thumbnail, services, dataset_id, split, index, size)
    return Response(await services.drawing.run(work), media_type=openapi.PNG, headers=INERT)


def _thumbnail(services: Services, reference: str, split: str, index: int, size: int) -> bytes:
    dataset = _stored(services, reference)
    data = services.stored_datasets.open(dataset.key).read(split, index)
    picture = decode_image(data, services.settings.max_image_pixels)
    picture.thumbnail((size, size))
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@router.get(
    "/datasets/{dataset_id}/samples.png",
    summary="See some images of a dataset",
    response_class=Response,
    responses=openapi.picture(problems=(404, 409, 422, 429)),
)
async def get_samples(
    dataset_id: DatasetRef,
    services: ServicesDep,
    split: SplitQuery = DEFAULT_SPLIT,
    label: LabelQuery = None,
    seed: Annotated[int, Query(ge=0, le=2**32 - 1, description="Chooses which")] = 0,
    num_images: Annotated[int, Query(ge=1, le=plots.MAX_SAMPLES)] = plots.MAX_SAMPLES,
) -> Response:
    """Squares cut from the middle, as training takes them, with their labels."""
    work = partial(_samples, services, dataset_id, split, label, seed, num_images)
    headers = {"Cache-Control": "private, max-age=3600"}
    return Response(await services.drawing.run(work), media_type=openapi.PNG, headers=headers)


def _samples(
    services: Services, reference: str, split: str, label: str | None, seed: int, num_images: int
) -> bytes:
    dataset = _stored(services, reference)
    opened = services.stored_datasets.open(dataset.key)
    rows = opened.rows(split, label)
    if not rows:
        message = "The split has no images of this class"
        raise InvalidInput(message, errors=[{"loc": "label", "message": message}])
    count = min(num_images, len(rows))
    chosen = np.random.default_rng(seed).choice(rows.stop - rows.start, count, replace=False)
    side = min(max(dataset.image_size, 32), SAMPLE_SIDE)
    found = opened.split(split)
    places = [rows.start + int(place) for place in chosen]
    squares = [
        to_square(decode_image(opened.read(split, row), services.settings.max_image_pixels), side)
        for row in places
    ]
    labels = [opened.index.classes[found.labels[row]] for row in places]
    return plots.draw_samples(np.stack(squares), labels, f"{dataset.name}: {count} of {split}")


@router.get(
    "/datasets/{dataset_id}/classes.png",
    summary="See how many images the classes have",
    response_class=Response,
    responses=openapi.picture(problems=(404, 429)),
)
async def get_classes(dataset_id: DatasetRef, services: ServicesDep) -> Response:
    """A bar a class, split by split."""

    def draw() -> bytes:
        with services.database.read_scope() as session:
            row = datasets.get_dataset(session, dataset_id)
            document = datasets.dataset_documents(session, [row])[0]
        return plots.draw_classes(document)

    return Response(await services.drawing.run(draw), media_type=openapi.PNG)
