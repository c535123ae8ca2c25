from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch

from shared.errors import CheckpointCorrupt
from worker.engine.resume import load_resume, save_resume


class Exploding:
    def __reduce__(self) -> object:
        return (pytest.fail, ("code from the file ran",))


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = {"step": 3, "best": None, "loss": float("inf"), "sums": torch.arange(3.0)}
    save_resume(tmp_path / "resume.pt", state)
    loaded = load_resume(tmp_path / "resume.pt")
    assert torch.equal(loaded.pop("sums"), state.pop("sums"))
    assert loaded == state


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_disk_is_the_systems_own_error() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        save_resume(Path("/dev/full"), {"sums": torch.zeros(1_000_000)})
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_may_not_grow_is_the_systems_own_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_resume(tmp_path / "resume.pt", {"sums": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "code"])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "resume.pt"
    save_resume(path, {"step": 3, "sums": torch.arange(3000.0)})
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "text":
        path.write_bytes(b"hello" * 100)
    else:
        torch.save({"step": Exploding()}, path)
    with pytest.raises(CheckpointCorrupt) as caught:
        load_resume(path)
    assert str(tmp_path) not in str(caught.value)
