"""The server's process, as `skipline api` makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gc, os, signal, sys, threading, time
from api.server import serve
from shared import schema
from shared.database import Database
from shared.settings import Settings

def watch():
    deadline = time.monotonic() + 60
    while not gc.get_freeze_count() and time.monotonic() < deadline:
        time.sleep(0.05)
    print("torch" in sys.modules, gc.get_freeze_count(), len(gc.get_objects()))
    os.kill(os.getpid(), signal.SIGTERM)

settings = Settings(home=sys.argv[1])
database = Database(settings.database)
schema.migrate(database)
database.dispose()
threading.Thread(target=watch).start()
serve(settings, "127.0.0.1", 0, "predict")
"""


def test_a_full_collection_of_garbage_passes_over_what_torch_brought(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "home")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=90)
    # uvicorn ends a process that was sent SIGTERM by that signal, once it has left in peace.
    *_, printed = (line for line in done.stdout.splitlines() if line.startswith("True"))
    _, frozen, walked = printed.split()
    assert int(frozen) > 10 * int(walked)
