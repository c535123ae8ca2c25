"""Artifacts are complete or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import CheckpointCorrupt, SetupError
from shared.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "artifacts")


def write(storage: Storage, key: str = "jobs/j/1/5") -> None:
    with storage.writing(key, "me") as folder:
        (folder / "a.bin").write_bytes(b"abc")
        (folder / "b.bin").write_bytes(b"defg")


def test_a_folder_appears_when_it_is_complete(storage: Storage) -> None:
    with storage.writing("jobs/j/1/5", "me") as folder:
        (folder / "a.bin").write_bytes(b"abc")
        assert storage.keys("jobs/j") == []
        assert not storage.path("jobs/j/1/5").exists()
    assert storage.keys("jobs/j") == ["jobs/j/1/5"]
    assert (storage.verify("jobs/j/1/5") / "a.bin").read_bytes() == b"abc"


def test_a_writer_that_fails_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(RuntimeError), storage.writing("jobs/j/1/5", "me") as folder:
        (folder / "a.bin").write_bytes(b"abc")
        raise RuntimeError
    assert list(storage.root.rglob("a.bin")) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_noticed(storage: Storage, damage: str) -> None:
    write(storage)
    folder = storage.path("jobs/j/1/5")
    if damage == "flip":
        (folder / "b.bin").write_bytes(b"defh")
    elif damage == "truncate":
        (folder / "b.bin").write_bytes(b"def")
    elif damage == "remove":
        (folder / "b.bin").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointCorrupt):
        storage.verify("jobs/j/1/5")


def test_only_the_files_asked_for_are_checked(storage: Storage) -> None:
    write(storage)
    (storage.path("jobs/j/1/5") / "b.bin").write_bytes(b"????")
    storage.verify("jobs/j/1/5", "a.bin")
    with pytest.raises(CheckpointCorrupt):
        storage.verify("jobs/j/1/5", "b.bin")


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "jobs/../../x", "", "."])
def test_no_key_leads_out_of_the_storage(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        storage.path(key)


def test_what_a_killed_writer_left_is_swept_away_and_nothing_else(storage: Storage) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from shared.storage import Storage
with Storage(Path(sys.argv[1])).writing("jobs/j/1/6", "dead") as folder:
    (folder / "a.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script, str(storage.root)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert storage.keys("jobs") == []
    assert len(list(storage.root.rglob("a.bin"))) == 1
    with storage.writing("jobs/j/1/7", "alive") as folder:
        storage.sweep("dead")
        assert list(storage.root.rglob("a.bin")) == []
        (folder / "a.bin").write_bytes(b"whole")
    assert storage.keys("jobs") == ["jobs/j/1/7"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SetupError, match="SKIPLINE_HOME"):
        Storage(tmp_path / "artifacts")


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="SKIPLINE_HOME"):
        Storage(tmp_path / "file")


def test_a_disk_that_cannot_be_read_is_no_damage(storage: Storage) -> None:
    write(storage)
    manifest = storage.path("jobs/j/1/5") / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(IsADirectoryError):
        storage.verify("jobs/j/1/5")
