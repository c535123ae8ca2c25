"""A lock tells whether its owner, or a child that inherited it, is alive on this host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shared import locks


def test_an_owner_is_dead_once_its_process_is_gone(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from shared.locks import OwnerLock
print(OwnerLock(Path(sys.argv[1])).owner, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        assert not locks.is_dead(tmp_path, owner)
        process.kill()
        process.wait()
    assert locks.is_dead(tmp_path, owner)
    assert locks.dead_owners(tmp_path) == [owner]
    locks.forget(tmp_path, owner)
    assert locks.dead_owners(tmp_path) == []


def test_an_owner_lives_on_in_the_child_that_inherited_its_lock(tmp_path: Path) -> None:
    lock = locks.OwnerLock(tmp_path)
    with subprocess.Popen(
        ["/bin/cat"], stdin=subprocess.PIPE, pass_fds=(lock.descriptor,)
    ) as child:
        lock.release()
        assert not locks.is_dead(tmp_path, lock.owner)
        child.kill()
    assert locks.is_dead(tmp_path, lock.owner)


def test_nothing_is_said_of_owners_of_other_hosts(tmp_path: Path) -> None:
    assert not locks.is_dead(tmp_path, "elsewhere")
    assert locks.dead_owners(tmp_path / "missing") == []
