"""Uploads against a real server: broken off in every way, they go on where they were."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.settings import Settings
from shared.uploads import data_path
from skipline import Skipline
from skipline.client import SkiplineError
from skipline.uploading import FolderSource, Memory, SourceChanged, open_source
from tests.api.conftest import Running, ready_settings, wait_for


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    return ready_settings(home, f"sqlite:///{home / 'test.sqlite3'}")


@pytest.fixture
def running() -> Iterator[Running]:
    started = Running()
    yield started
    started.stop()


@pytest.fixture
def url(running: Running, settings: Settings) -> str:
    return running.start(settings).url


@pytest.fixture(autouse=True)
def _small_parts_and_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SKIPLINE_UPLOAD_PART_BYTES", "1000")


def noise(path: Path, num_bytes: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(num_bytes))
    return path


def received(settings: Settings, upload_id: str) -> bytes:
    return data_path(settings.artifacts_path, upload_id).read_bytes()


def folder_of_files(root: Path) -> Path:
    """Names of every length, an empty file, and what is left out."""
    for name, size in (
        ("cat/1.png", 700),
        ("cat/" + "long" * 40 + ".png", 512),
        ("cat/ü.png", 1),
        ("dog/empty.png", 0),
        ("dog/2.png", 5000),
        ("dog/.hidden", 9),
        ("__MACOSX/dog/3.png", 9),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(root / name, size, seed=size)
    (root / "dog" / "link.png").symlink_to(root / "dog" / "2.png")
    return root


def test_a_folder_is_sent_as_the_tar_that_it_would_be(tmp_path: Path) -> None:
    root = folder_of_files(tmp_path / "pets")
    source = FolderSource(root)
    whole = source.read(0, source.num_bytes)
    assert len(whole) == source.num_bytes
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        found = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    names = ["cat/1.png", f"cat/{'long' * 40}.png", "cat/ü.png", "dog/2.png", "dog/empty.png"]
    assert found == {name: (root / name).read_bytes() for name in names}
    for size in (1, 511, 512, 1000, 4096):
        parts = [source.read(start, size) for start in range(0, source.num_bytes, size)]
        assert b"".join(parts) == whole


def test_a_fingerprint_changes_with_the_files_alone(tmp_path: Path) -> None:
    root = folder_of_files(tmp_path / "pets")
    before = open_source(root).fingerprint
    assert open_source(root).fingerprint == before
    (root / "dog" / ".hidden").write_text("other")
    assert open_source(root).fingerprint == before
    noise(root / "dog" / "2.png", 5000, seed=1)
    assert open_source(root).fingerprint != before


def test_a_file_arrives_as_it_is_and_progress_is_told(
    url: str, settings: Settings, tmp_path: Path
) -> None:
    path = noise(tmp_path / "pets.zip", 4500)
    told: list[tuple[int, int]] = []
    with Skipline(url) as client:
        upload = client.upload(path, progress=lambda sent, total: told.append((sent, total)))
    assert received(settings, upload.id) == path.read_bytes()
    assert (upload.file_name, upload.offset) == ("pets.zip", 4500)
    assert told == [(sent, 4500) for sent in (0, 1000, 2000, 3000, 4000, 4500)]


def test_a_folder_arrives_as_a_tar(url: str, settings: Settings, tmp_path: Path) -> None:
    root = folder_of_files(tmp_path / "pets")
    source = FolderSource(root)
    with Skipline(url) as client:
        upload = client.upload(root)
    assert upload.file_name == "pets.tar"
    assert received(settings, upload.id) == source.read(0, source.num_bytes)


class Interrupted(Exception):
    pass


def stop_at(share: float) -> Callable[[int, int], None]:
    def progress(sent: int, total: int) -> None:
        if sent >= share * total:
            raise Interrupted

    return progress


def test_what_was_broken_off_goes_on_where_it_was(
    url: str, settings: Settings, tmp_path: Path
) -> None:
    path = noise(tmp_path / "pets.zip", 10_000)
    with Skipline(url) as client:
        with pytest.raises(Interrupted):
            client.upload(path, progress=stop_at(0.5))
        told: list[int] = []
        upload = client.upload(path, progress=lambda sent, total: told.append(sent))
        assert told[0] == 5000
        assert received(settings, upload.id) == path.read_bytes()
        # What is complete is forgotten: the same file again is another upload.
        assert client.upload(path).id != upload.id


def test_another_file_at_the_same_path_is_another_upload(
    url: str, settings: Settings, tmp_path: Path
) -> None:
    path = noise(tmp_path / "pets.zip", 10_000)
    with Skipline(url) as client:
        with pytest.raises(Interrupted):
            client.upload(path, progress=stop_at(0.5))
        noise(path, 10_000, seed=1)
        upload = client.upload(path)
    assert received(settings, upload.id) == path.read_bytes()


def test_an_upload_that_is_gone_begins_anew(url: str, settings: Settings, tmp_path: Path) -> None:
    path = noise(tmp_path / "pets.zip", 10_000)
    with Skipline(url) as client:
        with pytest.raises(Interrupted):
            client.upload(path, progress=stop_at(0.5))
        known = Memory().recall(client.url, open_source(path).fingerprint)
        client._answer("DELETE", f"uploads/{known}", expected=(204,))
        upload = client.upload(path)
    assert upload.id != known
    assert received(settings, upload.id) == path.read_bytes()


def test_a_file_that_changes_meanwhile_is_refused(url: str, tmp_path: Path) -> None:
    path = noise(tmp_path / "pets.zip", 10_000)

    def change(sent: int, total: int) -> None:
        if sent == 5000:
            noise(path, 10_001, seed=1)

    with Skipline(url) as client, pytest.raises(SourceChanged, match="has changed"):
        client.upload(path, progress=change)


def test_a_server_that_dies_and_comes_back_is_waited_for(
    running: Running, settings: Settings, tmp_path: Path
) -> None:
    import threading

    api = running.start(settings)
    path = noise(tmp_path / "pets.zip", 10_000)
    restarted = []

    def again() -> None:
        api.server.should_exit = True
        wait_for(lambda: not api.server.started or port_is_free(api.url), "end of the server")
        restarted.append(start_at(settings, api.url))

    def progress(sent: int, total: int) -> None:
        if sent == 5000 and not restarted:
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    with Skipline(api.url) as client:
        upload = client.upload(path, progress=progress)
    assert received(settings, upload.id) == path.read_bytes()
    for process in restarted:
        process.terminate()
        process.wait(timeout=30)


def port_is_free(url: str) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


def start_at(settings: Settings, url: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "SKIPLINE_HOME": str(settings.home_path),
        "SKIPLINE_DATABASE_URL": settings.database,
    }
    command = [sys.executable, "-m", "skipline", "api", "--port", url.rpartition(":")[2]]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_a_sender_that_was_killed_goes_on_in_another_process(
    url: str, settings: Settings, tmp_path: Path
) -> None:
    """By the command line, as a user would."""
    path = noise(tmp_path / "pets.zip", 3_000_000)
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    environment = os.environ | {"SKIPLINE_API_URL": url}
    command = [sys.executable, "-m", "skipline", "datasets", "add", str(path), "--upload"]

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *words], env=environment, text=True, stderr=subprocess.PIPE
        )

    first = start("--no-watch")
    with Skipline(url) as client:

        def offset() -> int:
            uploads = client._answer("GET", "uploads").json()["items"]
            return max(
                (
                    u["offset"]
                    for u in uploads
                    if u["file_name"] == "pets.zip" and u["num_bytes"] == 3_000_004
                ),
                default=0,
            )

        wait_for(lambda: offset() > 100_000, "first parts")
        first.send_signal(signal.SIGKILL)
        first.communicate()
        there = offset()
        assert there < 3_000_004
        second = start("--no-watch")
        _, told = second.communicate(timeout=120)
        assert second.returncode == 0, told
        # The first line says how much was there already.
        shares = [int(line.split()[1].rstrip("%")) for line in told.splitlines() if "sent" in line]
        assert shares[-1] == 100
        job = next(iter(client.jobs()))
    assert received(settings, str(job.spec["upload_id"])) == path.read_bytes()


def test_a_path_that_the_server_may_read_is_not_sent(
    url: str, settings: Settings, tmp_path: Path
) -> None:
    [root] = settings.dataset_roots
    folder = folder_of_files(root / f"pets{time.time_ns()}")
    elsewhere = folder_of_files(tmp_path / "elsewhere")
    with Skipline(url) as client:
        assert client.add_dataset(folder).spec["source"] == "path"
        assert client.add_dataset(folder, upload=True).spec["source"] == "upload"
        job = client.add_dataset(elsewhere, val_fraction=0.5, seed=3)
        assert (job.spec["source"], job.spec["name"], job.spec["seed"]) == (
            *("upload", "elsewhere", 3),
        )
        with pytest.raises(SkiplineError) as caught:
            client.add_dataset(elsewhere, upload=False)
    assert caught.value.code == "path_not_allowed"


def test_a_memory_that_cannot_be_read_or_written_is_no_trouble(
    url: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = noise(tmp_path / "pets.zip", 2000)
    with Skipline(url) as client:
        assert received(settings, client.upload(path).id) == path.read_bytes()
