"""Which packed datasets stay when the cache has grown too large, with real processes that use and
make them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker.datasets.cache import bound, forget, hold, lock_path, partial_path

KIB = 1024
HOLDER = """
import sys
from pathlib import Path
from worker.datasets import cache
from worker.datasets.locks import exclusive

folder = Path(sys.argv[2])
if sys.argv[1] == "use":
    assert cache.hold(folder)
    print("ready", flush=True)
    sys.stdin.readline()
else:
    with exclusive(cache.lock_path(folder)):
        cache.partial_path(folder).mkdir()
        (cache.partial_path(folder) / "train.images").write_bytes(bytes(1024))
        print("ready", flush=True)
        sys.stdin.readline()
"""

Start = Callable[[str, Path], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start("use" or "make", folder)` starts a process and waits until it does so."""
    started: list[subprocess.Popen[str]] = []

    def run(what: str, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, what, str(folder)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def packed(root: Path, name: str, used_at: int, size: int = 8) -> Path:
    """A folder of 1 KiB that was used at this second of the epoch."""
    folder = root / name / str(size)
    folder.mkdir(parents=True)
    lock_path(folder).touch()
    (folder / "train.images").write_bytes(bytes(KIB))
    os.utime(folder, (used_at, used_at))
    return folder


def test_those_go_that_were_used_longest_ago(tmp_path: Path) -> None:
    newest, oldest, middle = (
        packed(tmp_path, n, t) for n, t in (("a", 300), ("b", 100), ("c", 200))
    )
    bound(tmp_path, 3 * KIB)
    assert (newest.exists(), middle.exists(), oldest.exists()) == (True, True, True)
    bound(tmp_path, 2 * KIB + 1)
    assert (newest.exists(), middle.exists(), oldest.exists()) == (True, True, False)
    bound(tmp_path, KIB - 1)
    assert (newest.exists(), middle.exists()) == (False, False)
    bound(tmp_path, 0)
    bound(tmp_path / "none", 0)


def test_taking_into_use_is_what_counts(tmp_path: Path, start: Start) -> None:
    first, second = packed(tmp_path, "a", 100), packed(tmp_path, "b", 200)
    process = start("use", first)
    process.communicate("\n")
    bound(tmp_path, KIB)
    assert (first.exists(), second.exists()) == (True, False)


def test_what_another_process_uses_stays_until_that_ends(tmp_path: Path, start: Start) -> None:
    used, other = packed(tmp_path, "a", 100), packed(tmp_path, "b", 2**33)
    process = start("use", used)
    bound(tmp_path, 0)
    assert (used.exists(), other.exists()) == (True, False)
    process.kill()  # The system frees what it held.
    process.wait()
    bound(tmp_path, 0)
    assert not used.exists()


def test_what_another_process_makes_stays(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "a" / "8"
    folder.parent.mkdir()
    process = start("make", folder)
    bound(tmp_path, 0)
    assert (partial_path(folder) / "train.images").exists()
    process.kill()
    process.wait()
    bound(tmp_path, 0)
    assert not partial_path(folder).exists()


def test_what_was_removed_while_one_waited_for_it_is_not_there(tmp_path: Path) -> None:
    folder = packed(tmp_path, "a", 100)
    assert hold(folder)
    (folder / "train.images").unlink()
    folder.rmdir()
    assert not hold(folder)
    packed(tmp_path, "a", 100, size=16)
    assert hold(tmp_path / "a" / "16")


def test_a_second_use_by_one_process_opens_no_second_descriptor(tmp_path: Path) -> None:
    folder = packed(tmp_path, "a", 100)
    assert hold(folder)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(10):
        assert hold(folder)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before
    assert folder.stat().st_mtime > 100


def test_what_is_of_a_deleted_dataset_goes_unless_it_is_used(tmp_path: Path, start: Start) -> None:
    kept, used = packed(tmp_path, "kept", 1), packed(tmp_path, "used", 1)
    gone = packed(tmp_path, "gone", 1)
    start("use", used)
    forget(tmp_path, {"kept"})
    assert (kept.exists(), used.exists(), gone.exists()) == (True, True, False)
