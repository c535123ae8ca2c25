"""The arrows between the packages, read from the source: who may import whom, who may write what.

`violations` looks at any tree with the same folders, so that each rule is also shown to fail.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("skipline", "shared", "api", "worker", "migrations")

BASE_INSTALL = (
    "pydantic",
    "pydantic_core",
    "pydantic_settings",
    "httpx2",
    "yaml",
    "rich",
    "typer",
)
"""What `skipline` may need when it is imported; anything else only inside a function."""
TORCH = ("torch", "torchvision", "safetensors.torch")
VOCABULARY = (
    "skipline.specs",
    "skipline.recipes",
    "skipline.catalog",
    "skipline.schemas",
    "skipline.plots",
)


@dataclass(frozen=True)
class Import:
    """`deferred`: inside a function, or for the type checker only."""

    module: str
    line: int
    deferred: bool


def imports_of(tree: ast.AST, deferred: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute here"
            # `from shared import schema` may name a module: look at both.
            yield from (
                Import(f"{node.module}.{alias.name}", node.lineno, deferred) for alias in node.names
            )
        else:
            is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports_of(node, deferred or is_typing or is_function)


def is_below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def may_import(file: str, found: Import) -> bool:
    """Whether `file` (its path below the root) may have this import."""
    module = found.module
    top = module.partition(".")[0]
    package = file.partition("/")[0]
    ours = top in PACKAGES
    if file == "skipline/server_commands.py" and found.deferred:
        return True
    match package:
        case "skipline":
            if ours:
                vocabulary = file.removesuffix(".py").replace("/", ".") in VOCABULARY
                return top == "skipline" and (not vocabulary or is_below(module, *VOCABULARY))
            return found.deferred or top in sys.stdlib_module_names or is_below(top, *BASE_INSTALL)
        case "shared":
            if is_below(module, *TORCH):
                return file.startswith("shared/vision/")
            return not ours or top in ("shared", "migrations") or is_below(module, *VOCABULARY)
        case "api":
            if is_below(module, *TORCH, "shared.vision"):
                return file.startswith("api/serving/")
            if top == "sqlalchemy":  # Names of errors and of the session; no statements.
                return is_below(module, "sqlalchemy.exc", "sqlalchemy.orm.Session")
            return not ours or top in ("api", "shared") or is_below(module, *VOCABULARY)
        case "worker":
            if file.startswith("worker/engine/"):
                libraries = (*TORCH, "numpy", "pydantic")
                inside = ("worker.engine", "shared.vision", "shared.errors", *VOCABULARY)
                return top in sys.stdlib_module_names or is_below(module, *libraries, *inside)
            return not ours or top in ("worker", "shared") or is_below(module, *VOCABULARY)
        case _:
            return not ours or top in ("migrations", "shared")


def writes_a_status(node: ast.AST) -> bool:
    """`update(Job)….values(status=…)`, or `job.status = …`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        changes = node.func.attr == "values" and "update(Job)" in ast.unparse(node.func)
        return changes and any(keyword.arg == "status" for keyword in node.keywords)
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Attribute) and t.attr == "status" for t in node.targets)
    return False


def commits(node: ast.AST) -> bool:
    """`….commit()`, or `begin()` of a session, a connection or an engine."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    receiver = ast.unparse(node.func.value)
    begins = node.func.attr == "begin" and receiver.endswith(("session", "connection", "engine"))
    return begins or node.func.attr == "commit"


ONLY_IN: list[tuple[str, Callable[[ast.AST], bool], str]] = [
    ("shared/lifecycle.py", writes_a_status, "only shared/lifecycle.py changes a status"),
    ("shared/database.py", commits, "only shared/database.py begins and commits transactions"),
]


def violations(root: Path) -> list[str]:
    """Every line below `root` that breaks a rule."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [
                f"{file}:{imported.line}: may not import {imported.module}"
                for imported in imports_of(tree)
                if not may_import(file, imported)
            ]
            found += [
                f"{file}:{node.lineno}: {rule}"  # type: ignore[attr-defined]
                for home, breaks, rule in ONLY_IN
                if file != home and package != "skipline"
                for node in ast.walk(tree)
                if breaks(node)
            ]
    return found


def test_nothing_runs_up_the_arrows() -> None:
    assert violations(ROOT) == []


PLANTED = {
    "skipline imports the server": ("skipline/client.py", "import shared.settings"),
    "skipline imports a server's library": ("skipline/client.py", "import numpy"),
    "server_commands imports the server at once": (
        "skipline/server_commands.py",
        "from api.server import serve",
    ),
    "the vocabulary imports the client": ("skipline/specs.py", "from skipline.client import X"),
    "the pictures know files": ("skipline/plots.py", "from skipline.cli.plot import X"),
    "shared imports the API": ("shared/storage.py", "from api import problems"),
    "shared imports the worker": ("shared/storage.py", "def f():\n    import worker.tasks"),
    "shared imports the client": ("shared/storage.py", "from skipline import Skipline"),
    "torch outside shared.vision": ("shared/storage.py", "def f():\n    import torch"),
    "the API imports torch": ("api/jobs.py", "import torch.nn"),
    "the API decodes outside serving": ("api/jobs.py", "from shared.vision import preprocessing"),
    "the API speaks SQL": ("api/jobs.py", "from sqlalchemy import select"),
    "the API imports the worker": ("api/jobs.py", "from worker.app import run"),
    "the worker imports the API": ("worker/slots.py", "import api"),
    "the engine knows SQL": ("worker/engine/trainer.py", "import sqlalchemy"),
    "the engine knows settings": ("worker/engine/trainer.py", "from shared import settings"),
    "the engine knows Celery": ("worker/engine/trainer.py", "def f():\n    import celery"),
    "the engine knows the runner": ("worker/engine/trainer.py", "from worker import sink"),
    "a status is written by SQL": (
        "worker/sink.py",
        "q = update(Job).where(Job.id == 1).values(status='failed')",
    ),
    "a status is assigned": ("shared/reaper.py", "job.status = 'failed'"),
    "a commit elsewhere": ("shared/repository.py", "session.commit()"),
    "a transaction elsewhere": ("api/jobs.py", "with session.begin():\n    pass"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case: str, tmp_path: Path) -> None:
    file, code = PLANTED[case]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert [line.partition(":")[0] for line in violations(tmp_path)] == [file]


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages in memory after a fresh process imported `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_workers_main_process_never_loads_torch() -> None:
    main = ["app", "tasks", "slots", "supervisor", "trainer_process"]
    loaded = loaded_by(*(f"worker.{name}" for name in main))
    assert "celery" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "PIL"}


def test_the_client_and_the_command_line_load_nothing_of_the_servers() -> None:
    loaded = loaded_by("skipline", "skipline.cli")
    assert {"httpx2", "pydantic", "typer"} <= loaded
    servers = {"sqlalchemy", "fastapi", "celery", "torch", "numpy", "matplotlib", "alembic"}
    assert not loaded & (servers | {"shared", "api", "worker"})
