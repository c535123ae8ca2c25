"""Uploads: in parts by tus, or whole by a form; what is broken off, refused, or left."""

from __future__ import annotations

import base64
import io
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select

from shared import uploads
from shared.database import Database
from shared.housekeeping import Housekeeper
from shared.settings import Settings
from shared.storage import Storage
from shared.tables import Job, Upload
from skipline.schemas import JobStatus

PART = {"Content-Type": "application/offset+octet-stream"}


def zipped(*names: str) -> bytes:
    """A zip with a file for each name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names or ("cat/1.png", "dog/1.png"):
            archive.writestr(name, b"x" * 1000)
    return buffer.getvalue()


ARCHIVE = zipped()


def announce(api: Any, num_bytes: int, name: str = "pets.zip") -> str:
    """The address of a new upload."""
    metadata = f"filename {base64.b64encode(name.encode()).decode()}"
    headers = {"Upload-Length": str(num_bytes), "Upload-Metadata": metadata}
    response = api.post("/uploads", headers=headers)
    assert response.status_code == 201, response.text
    location: str = response.headers["location"]
    return location


def send(api: Any, location: str, data: bytes, offset: int) -> Any:
    return api.patch(location, content=data, headers={**PART, "Upload-Offset": str(offset)})


def begin_part(api: Any, location: str, data: bytes, num_bytes: int) -> socket.socket:
    """A connection over which so many bytes were sent of a part that was to be all of `data`."""
    host, _, port = api.url.removeprefix("http://").partition(":")
    head = (
        f"PATCH {location} HTTP/1.1\r\nHost: {host}\r\nUpload-Offset: 0\r\n"
        f"Content-Type: {PART['Content-Type']}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + data[:num_bytes])
    return connection


def uploaded(api: Any, data: bytes = ARCHIVE, name: str = "pets.zip") -> str:
    """The id of a complete upload."""
    location = announce(api, len(data), name)
    assert send(api, location, data, 0).status_code == 204
    return location.rpartition("/")[2]


def files_below(settings: Settings) -> list[str]:
    root = settings.artifacts_path
    tree = os.walk(root / "uploads")  # which may change meanwhile
    return sorted(
        str((Path(at) / name).relative_to(root)) for at, _, names in tree for name in names
    )


@pytest.fixture(autouse=True)
def _no_files_of_other_tests(request: pytest.FixtureRequest) -> None:
    """The server of a module has one storage, while the database is empty for each test."""
    if "settings" in request.fixturenames:
        settings: Settings = request.getfixturevalue("settings")
        shutil.rmtree(settings.artifacts_path / "uploads", ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_is_left_in_temporary_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def test_a_file_sent_in_parts_is_whole(api: Any, settings: Settings) -> None:
    location = announce(api, len(ARCHIVE))
    for offset in range(0, len(ARCHIVE), 100):
        response = send(api, location, ARCHIVE[offset : offset + 100], offset)
        assert (response.status_code, response.headers["tus-resumable"]) == (204, "1.0.0")
        assert int(response.headers["upload-offset"]) == min(offset + 100, len(ARCHIVE))
    head = api.head(location)
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == (
        *(str(len(ARCHIVE)), str(len(ARCHIVE))),
    )
    assert head.headers["cache-control"] == "no-store"
    document = api.get(location).json()
    assert (document["file_name"], document["offset"]) == ("pets.zip", len(ARCHIVE))
    assert uploads.data_path(settings.artifacts_path, document["id"]).read_bytes() == ARCHIVE
    assert api.get("/uploads").json()["items"] == [document]


def test_what_is_spoken_is_told(sqlite_api: Any) -> None:
    headers = sqlite_api.options("/uploads").headers
    assert headers["tus-version"] == "1.0.0"
    assert set(headers["tus-extension"].split(",")) == {"creation", "expiration", "termination"}
    assert int(headers["tus-max-size"]) == 20 * 2**30


def test_a_part_that_is_broken_off_stays_and_is_gone_on_with(api: Any, wait_for: Any) -> None:
    data = bytes(range(256)) * 20_000
    location = announce(api, len(data))
    begin_part(api, location, data, 3_000_000).close()
    # The server learns of it when it has read what came.
    offset = wait_for(lambda: int(api.head(location).headers["upload-offset"]), "bytes")

    def go_on() -> bool:
        nonlocal offset
        offset = int(api.head(location).headers["upload-offset"])
        return bool(send(api, location, data[offset:], offset).status_code == 204)

    wait_for(go_on, "end of the first request")
    assert 0 < offset <= 3_000_000
    assert api.get(location).json()["offset"] == len(data)


def test_who_falls_silent_within_a_part_makes_room_for_its_rest(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 20_000
    location = announce(api, len(data))
    monkeypatch.setattr("api.bodies.SILENCE_SECONDS", 0.5)
    with begin_part(api, location, data, 3_000_000) as silent:
        answer = b""
        while received := silent.recv(65536):  # until the server cuts the connection
            answer += received
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer
        assert int(api.head(location).headers["upload-offset"]) == 3_000_000
        assert send(api, location, data[3_000_000:], 3_000_000).status_code == 204


def test_two_cannot_write_at_once(
    api: Any, settings: Settings, assert_problem: Callable[..., Any]
) -> None:
    location = announce(api, 10)
    with uploads.Writer(settings.artifacts_path, location.rpartition("/")[2], 10):
        assert_problem(send(api, location, b"12345", 0), 423, "upload_busy")
    assert send(api, location, b"12345", 0).status_code == 204


@pytest.mark.parametrize(
    ("headers", "content", "status", "code"),
    [
        ({"Upload-Offset": "1"}, b"123", 409, "offset_mismatch"),
        ({"Upload-Offset": "-1"}, b"123", 422, "invalid_input"),
        ({}, b"123", 422, "invalid_input"),
        ({"Upload-Offset": "9" * 30}, b"123", 422, "invalid_input"),
        ({"Upload-Offset": "0"}, b"x" * 11, 413, "body_too_large"),
        ({"Upload-Offset": "0", "Content-Type": "text/plain"}, b"x", 415, "unsupported_media_type"),
        ({"Upload-Offset": "0", "Tus-Resumable": "0.2"}, b"x", 412, "unsupported_tus_version"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_and_changes_nothing(
    api: Any,
    headers: dict[str, str],
    content: bytes,
    status: int,
    code: str,
    assert_problem: Callable[..., Any],
) -> None:
    location = announce(api, 10)
    response = api.patch(location, content=content, headers={**PART, **headers})
    assert_problem(response, status, code)
    assert response.headers["tus-resumable"] == "1.0.0"
    assert api.head(location).headers["upload-offset"] == "0"


def test_a_body_without_a_length_is_bounded_too(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    location = announce(api, 3 * 2**20)

    def chunks() -> Iterator[bytes]:
        for _ in range(8):
            yield b"x" * 2**20

    headers = {**PART, "Upload-Offset": "0"}
    assert_problem(api.patch(location, content=chunks(), headers=headers), 413, "body_too_large")
    assert int(api.head(location).headers["upload-offset"]) <= 3 * 2**20


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [
        ("x", 422, "invalid_input"),
        ("", 422, "invalid_input"),
        (str(20 * 2**30 + 1), 413, "body_too_large"),
        ("1" * 400, 422, "invalid_input"),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused_at_once(
    sqlite_api: Any, length: str, status: int, code: str, assert_problem: Callable[..., Any]
) -> None:
    assert_problem(sqlite_api.post("/uploads", headers={"Upload-Length": length}), status, code)


def test_a_disk_that_would_be_full_is_told_before_anything_is_sent(
    sqlite_api: Any, monkeypatch: pytest.MonkeyPatch, assert_problem: Callable[..., Any]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    refused = sqlite_api.post("/uploads", headers={"Upload-Length": str(2**30)})
    assert_problem(refused, 507, "disk_full")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**28 + 1000))
    refused = sqlite_api.post("/datasets", files={"archive": ("a.zip", ARCHIVE)})
    assert_problem(refused, 507, "disk_full")


def test_nobody_has_too_many_uploads(
    sqlite_settings: Settings, start_server: Any, assert_problem: Callable[..., Any]
) -> None:
    api = start_server(sqlite_settings.model_copy(update={"max_uploads_per_key": 2}))
    for upload in api.get("/uploads").json()["items"]:
        api.delete(f"/uploads/{upload['id']}")
    first = announce(api, 10)
    announce(api, 10)
    refused = api.post("/uploads", headers={"Upload-Length": "10"})
    assert_problem(refused, 429, "too_many_uploads")
    assert api.delete(first).status_code == 204
    announce(api, 10)


@pytest.mark.parametrize("name", ["..", "../jobs", "a/b", "a\x00b", "x" * 65, "\N{PILE OF POO}"])
def test_an_id_is_never_a_path(
    sqlite_api: Any, name: str, assert_problem: Callable[..., Any]
) -> None:
    from urllib.parse import quote

    response = sqlite_api.get(f"/uploads/{quote(name, safe='')}")
    assert response.status_code == 404


def test_names_of_files_are_harmless_labels(api: Any) -> None:
    for name, label in (
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\pets.zip", "pets.zip"),
        ("a\x00b\n.zip", "ab.zip"),
        ("/", "dataset"),
        ("é" * 300, "é" * 200),
    ):
        assert api.get(announce(api, 1, name)).json()["file_name"] == label


# --------------------------------------------------------------------------- datasets of uploads


def job_of(api: Any, document: dict[str, Any]) -> dict[str, Any]:
    response = api.post("/datasets", json=document)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def test_an_upload_becomes_a_dataset_called_as_its_file(api: Any) -> None:
    upload_id = uploaded(api, name="my.pets.tar.gz")
    job = job_of(api, {"source": "upload", "upload_id": upload_id, "val_fraction": 0.2})
    spec = job["spec"]
    assert (spec["upload_id"], spec["name"], spec["val_fraction"]) == (upload_id, "my.pets", 0.2)
    assert api.get(f"/uploads/{upload_id}").json()["job_id"] == job["id"]


def test_a_form_with_an_archive_becomes_a_dataset(api: Any, settings: Settings) -> None:
    form = {"name": "pets", "val_fraction": "0.25", "seed": "7"}
    files = {"archive": ("photos.zip", ARCHIVE, "application/zip")}
    job = api.post("/datasets", data=form, files=files)
    assert job.status_code == 202, job.text
    assert job.headers["location"] == f"/jobs/{job.json()['id']}"
    spec = job.json()["spec"]
    assert (spec["source"], spec["name"], spec["val_fraction"], spec["seed"]) == (
        *("upload", "pets", 0.25, 7),
    )
    path = uploads.data_path(settings.artifacts_path, spec["upload_id"])
    assert path.read_bytes() == ARCHIVE


def test_the_file_may_come_first_in_the_form(api: Any, settings: Settings) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="archive"; filename="a.zip"\r\n\r\n'
    tail = b'\r\n--x\r\nContent-Disposition: form-data; name="name"\r\n\r\npets\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    job = api.post("/datasets", content=head + ARCHIVE + tail, headers=headers)
    assert job.status_code == 202, job.text
    assert job.json()["spec"]["name"] == "pets"
    path = uploads.data_path(settings.artifacts_path, job.json()["spec"]["upload_id"])
    assert path.read_bytes() == ARCHIVE


@pytest.mark.parametrize(
    ("form", "files", "status", "code", "loc"),
    [
        ({"name": "pets"}, {"archive": ("a.zip", b"")}, 422, "bad_archive", None),
        ({"name": "pets"}, {"archive": ("a.zip", b"hello" * 200)}, 422, "bad_archive", None),
        ({"name": "pets"}, {"other": ("a.zip", ARCHIVE)}, 422, "invalid_input", "other"),
        ({"name": "digits"}, {"archive": ("a.zip", ARCHIVE)}, 422, "invalid_spec", "name"),
        ({"name": "pets:2"}, {"archive": ("a.zip", ARCHIVE)}, 422, "invalid_spec", "name"),
        ({"nmae": "pets"}, {"archive": ("a.zip", ARCHIVE)}, 422, "invalid_spec", "nmae"),
        (
            {"val_fraction": "2"},
            {"archive": ("a.zip", ARCHIVE)},
            422,
            "invalid_spec",
            "val_fraction",
        ),
        ({"name": "x" * 201}, {"archive": ("a.zip", ARCHIVE)}, 422, "invalid_spec", "name"),
        ({"name": "x" * 70_000}, {"archive": ("a.zip", ARCHIVE)}, 422, "invalid_input", "name"),
        ({"archive": "text"}, {"name": ("a.zip", ARCHIVE)}, 422, "invalid_input", "archive"),
    ],
)
def test_a_form_that_makes_no_dataset_is_refused_and_nothing_stays(
    api: Any,
    settings: Settings,
    form: dict[str, str],
    files: Any,
    status: int,
    code: str,
    loc: str | None,
    assert_problem: Callable[..., Any],
) -> None:
    document = assert_problem(api.post("/datasets", data=form, files=files), status, code)
    if loc:
        assert [item["loc"] for item in document["errors"]] == [loc]
    assert files_below(settings) == []
    assert api.get("/uploads").json()["items"] == []
    assert api.get("/jobs").json()["items"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="archive"; filename="a"\r\n\r\nPK\x03\x04',
        b"--x\r\nContent-Disposition: form-data\r\n\r\ny\r\n--x--\r\n",
        b"no form at all",
        b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\ny\r\n--x--\r\n",
    ],
)
def test_a_form_that_cannot_be_read_is_refused_and_nothing_stays(
    api: Any, settings: Settings, body: bytes, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_problem(api.post("/datasets", content=body, headers=headers), 400, "malformed_body")
    assert files_below(settings) == []


def test_a_form_without_a_boundary_or_another_body_is_refused(
    sqlite_api: Any, assert_problem: Callable[..., Any]
) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    assert_problem(
        sqlite_api.post("/datasets", content=b"x", headers=headers), 400, "malformed_body"
    )
    headers = {"Content-Type": "application/zip"}
    refused = sqlite_api.post("/datasets", content=ARCHIVE, headers=headers)
    assert_problem(refused, 415, "unsupported_media_type")


def test_a_form_that_is_too_large_or_broken_off_leaves_nothing(
    settings: Settings,
    database: Database,
    start_server: Any,
    wait_for: Any,
    assert_problem: Callable[..., Any],
) -> None:
    api = start_server(settings.model_copy(update={"max_upload_bytes": 3_000_000}))
    files = {"archive": ("a.zip", ARCHIVE + bytes(3_000_000))}
    assert_problem(api.post("/datasets", files=files), 413, "body_too_large")
    assert files_below(settings) == []
    host, _, port = api.url.removeprefix("http://").partition(":")
    head = (
        f"POST /datasets HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        'Content-Disposition: form-data; name="archive"; filename="a.zip"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + bytes(1_500_000))
        wait_for(lambda: files_below(settings), "beginning of the file")
    wait_for(lambda: not files_below(settings), "end of the file")
    with database.read_scope() as session:
        assert session.scalars(select(Upload)).all() == []


def test_a_form_sent_twice_with_one_key_is_one_job_and_one_file(
    api: Any, settings: Settings, assert_problem: Callable[..., Any]
) -> None:
    def post(data: bytes, **form: str) -> Any:
        headers = {"Idempotency-Key": "k"}
        return api.post("/datasets", data=form, files={"archive": ("a.zip", data)}, headers=headers)

    first = post(ARCHIVE, name="pets").json()
    assert post(ARCHIVE, name="pets").json()["id"] == first["id"]
    assert len(files_below(settings)) == 1
    assert_problem(post(ARCHIVE, name="cats"), 409, "idempotency_mismatch")
    assert_problem(post(zipped("a/1", "b/1"), name="pets"), 409, "idempotency_mismatch")
    assert len(files_below(settings)) == 1


def test_an_upload_that_is_not_complete_or_not_there_makes_no_dataset(
    api: Any, assert_problem: Callable[..., Any]
) -> None:
    location = announce(api, len(ARCHIVE))
    send(api, location, ARCHIVE[:-1], 0)
    document = {"source": "upload", "upload_id": location.rpartition("/")[2]}
    assert_problem(api.post("/datasets", json=document), 409, "upload_incomplete")
    send(api, location, ARCHIVE[-1:], len(ARCHIVE) - 1)
    job_of(api, document)
    for other in ("nothing", "../x"):
        refused = api.post("/datasets", json={"source": "upload", "upload_id": other})
        items = assert_problem(refused, 422, "invalid_input")["errors"]
        assert [item["loc"] for item in items] == ["upload_id"]
    text = uploaded(api, b"just text")
    refused = api.post("/datasets", json={"source": "upload", "upload_id": text})
    assert_problem(refused, 422, "bad_archive")


def test_an_upload_that_a_job_reads_is_not_deleted(
    api: Any, worker: Any, assert_problem: Callable[..., Any]
) -> None:
    upload_id = uploaded(api)
    job = job_of(api, {"source": "upload", "upload_id": upload_id})
    assert_problem(api.delete(f"/uploads/{upload_id}"), 409, "in_use")
    worker.claim().finish(JobStatus.failed)
    retry = api.post(f"/jobs/{job['id']}/retry")
    assert retry.status_code == 202, retry.text
    assert retry.json()["spec"]["upload_id"] == upload_id
    assert_problem(api.delete(f"/uploads/{upload_id}"), 409, "in_use")
    api.post(f"/jobs/{retry.json()['id']}/cancel")
    assert api.delete(f"/uploads/{upload_id}").status_code == 204
    assert_problem(api.get(f"/uploads/{upload_id}"), 404, "upload_not_found")
    refused = api.post(f"/jobs/{job['id']}/retry")
    assert_problem(refused, 422, "invalid_input")


def test_uploads_are_their_senders_own(
    settings: Settings, database: Database, api: Any, assert_problem: Callable[..., Any]
) -> None:
    location = announce(api, 10)
    with database.session_scope() as session:
        session.scalars(select(Upload)).one().submitter = "somebody else"
    for method in ("GET", "DELETE"):
        assert_problem(api.request(method, location), 404, "upload_not_found")
    assert_problem(send(api, location, b"x", 0), 404, "upload_not_found")
    assert api.get("/uploads").json()["items"] == []
    document = {"source": "upload", "upload_id": location.rpartition("/")[2]}
    assert_problem(api.post("/datasets", json=document), 422, "invalid_input")


# ----------------------------------------------------------------------------------------- expiry


def grow_old(database: Database, upload_id: str, settings: Settings) -> None:
    with database.session_scope() as session:
        upload = session.get_one(Upload, upload_id)
        upload.touched_at -= timedelta(seconds=settings.upload_expiry_seconds + 1)


def tidy(settings: Settings, database: Database) -> None:
    Housekeeper(settings, database, Storage(settings.artifacts_path)).tidy()


def test_what_nobody_takes_up_again_expires(
    api: Any, settings: Settings, database: Database, assert_problem: Callable[..., Any]
) -> None:
    old, young = (announce(api, 10).rpartition("/")[2] for _ in range(2))
    grow_old(database, old, settings)
    tidy(settings, database)
    assert_problem(api.get(f"/uploads/{old}"), 404, "upload_not_found")
    assert files_below(settings) == [f"uploads/{young}/data"]
    assert send(api, f"/uploads/{young}", b"x", 0).status_code == 204


def test_no_upload_expires_that_is_written_to_or_that_a_job_will_read(
    api: Any, settings: Settings, database: Database
) -> None:
    waiting, written = uploaded(api), announce(api, 10).rpartition("/")[2]
    job = job_of(api, {"source": "upload", "upload_id": waiting})
    for upload_id in (waiting, written):
        grow_old(database, upload_id, settings)
    with uploads.Writer(settings.artifacts_path, written, 10):
        tidy(settings, database)
        assert len(files_below(settings)) == 2
    api.post(f"/jobs/{job['id']}/cancel")
    tidy(settings, database)
    assert files_below(settings) == []


def test_what_a_job_has_read_and_could_not_remove_goes_at_once(
    api: Any, settings: Settings, database: Database
) -> None:
    job = job_of(api, {"source": "upload", "upload_id": uploaded(api)})
    with database.session_scope() as session:
        session.get_one(Job, job["id"]).status = JobStatus.succeeded
    tidy(settings, database)
    assert files_below(settings) == []
    assert api.get("/uploads").json()["items"] == []


def test_files_without_a_row_go_when_they_are_old(
    api: Any, settings: Settings, database: Database
) -> None:
    import time

    folder = settings.artifacts_path / "uploads" / "left"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"x")
    tidy(settings, database)
    assert folder.exists()
    long_ago = time.time() - settings.upload_expiry_seconds - 1
    for path in (folder / "data", folder):
        os.utime(path, (long_ago, long_ago))
    tidy(settings, database)
    assert not folder.exists()


def test_parts_at_once_are_never_mixed(api: Any) -> None:
    location = announce(api, 1000)

    def attempt(_: int) -> int:
        status: int = send(api, location, b"x" * 1000, 0).status_code
        return status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(attempt, range(8)))
    assert statuses.count(204) == 1
    assert set(statuses) <= {204, 409, 413, 423}
    assert api.get(location).json()["offset"] == 1000


def test_a_full_disk_while_a_part_comes_keeps_what_is_there(
    api: Any, monkeypatch: pytest.MonkeyPatch, assert_problem: Callable[..., Any]
) -> None:
    import errno

    location = announce(api, 3 * 2**20)
    write, calls = os.write, []

    def fills_up(descriptor: int, data: Any) -> int:
        if len(data) < 2**20:
            return write(descriptor, data)
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fills_up)
    assert_problem(send(api, location, bytes(3 * 2**20), 0), 507, "disk_full")
    monkeypatch.undo()
    offset = int(api.head(location).headers["upload-offset"])
    assert offset >= 2**20
    assert send(api, location, bytes(3 * 2**20 - offset), offset).status_code == 204
