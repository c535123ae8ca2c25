from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path

import pytest

from shared.errors import TrainingError
from worker.datasets import downloads
from worker.datasets.downloads import Original, fetch
from worker.datasets.locks import Interrupted

DATA = bytes(range(256)) * 20
Serve = Callable[[Callable[[], io.RawIOBase]], None]


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


ORIGINAL = Original("sub/data.bin", "http://archive.example/data.bin", md5(DATA))


class Answer(io.BytesIO):
    """An answer that ends, or breaks off."""

    def __init__(self, data: bytes, error: Exception | None = None) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data and self.error:
            raise self.error
        return data


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Answer | Exception]:
    """What the server answers, one after the other; nothing else is ever asked."""
    answers: list[Answer | Exception] = []

    def urlopen(request: object, timeout: float) -> Answer:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(downloads, "urlopen", urlopen)
    return answers


def left(root: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_what_is_missing_is_downloaded_once(
    tmp_path: Path, asked: list[Answer | Exception]
) -> None:
    asked.append(Answer(DATA))
    assert fetch("Data", ORIGINAL, tmp_path).read_bytes() == DATA
    assert fetch("Data", ORIGINAL, tmp_path) == tmp_path / "sub" / "data.bin"


def test_a_file_of_another_hash_is_replaced(
    tmp_path: Path, asked: list[Answer | Exception]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(DATA[:-1])
    asked.append(Answer(DATA))
    assert fetch("Data", ORIGINAL, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    "answer",
    [
        OSError("no network"),
        TimeoutError(),
        Answer(DATA[:100]),
        Answer(DATA[:100], IncompleteRead(b"")),
        Answer(DATA[:100], ConnectionResetError()),
        Answer(DATA[:-1] + b"x"),
    ],
)
def test_what_does_not_arrive_whole_never_counts(
    tmp_path: Path, asked: list[Answer | Exception], answer: Answer | Exception
) -> None:
    asked.append(answer)
    with pytest.raises(TrainingError, match="Data is not on this worker") as caught:
        fetch("Data", ORIGINAL, tmp_path)
    assert caught.value.code == "download_failed"
    assert "sub/data.bin" in caught.value.hint
    assert ORIGINAL.url in caught.value.hint
    assert ORIGINAL.md5 in caught.value.hint
    assert str(tmp_path) not in caught.value.message + caught.value.hint
    assert left(tmp_path) == {}


def test_a_users_file_of_another_hash_is_named_and_kept(
    tmp_path: Path, asked: list[Answer | Exception]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data.bin").write_bytes(b"mine")
    asked.append(OSError())
    with pytest.raises(TrainingError, match="in its place has another hash"):
        fetch("Data", ORIGINAL, tmp_path)
    assert left(tmp_path) == {"data.bin": b"mine"}


def test_a_full_disk_is_told_as_such(
    tmp_path: Path, asked: list[Answer | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    asked.append(Answer(DATA))
    monkeypatch.setattr(Path, "open", lambda path, mode: _open(path, mode, Full))
    with pytest.raises(TrainingError) as caught:
        fetch("Data", ORIGINAL, tmp_path)
    assert caught.value.code == "disk_full"


def _open(path: Path, mode: str, full: type[io.BytesIO]) -> object:
    if path.name.endswith(".partial"):
        return full()
    return open(path, mode)


def test_it_stops_when_told_and_leaves_nothing(
    tmp_path: Path, asked: list[Answer | Exception]
) -> None:
    asked.append(Answer(DATA))
    with pytest.raises(Interrupted):
        fetch("Data", ORIGINAL, tmp_path, lambda: True)
    assert left(tmp_path) == {}


def test_one_downloads_while_another_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_waits = threading.Event()
    num_asked = 0

    def urlopen(request: object, timeout: float) -> Answer:
        nonlocal num_asked
        num_asked += 1
        assert another_waits.wait(30)
        return Answer(DATA)

    def waiting() -> bool:
        another_waits.set()
        return False

    monkeypatch.setattr(downloads, "urlopen", urlopen)
    found: list[bytes] = []

    def want() -> None:
        found.append(fetch("Data", ORIGINAL, tmp_path, waiting).read_bytes())

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [DATA, DATA]
    assert num_asked == 1
