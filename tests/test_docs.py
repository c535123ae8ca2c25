"""What the documentation says is so: every command in it runs, every link leads somewhere, every
setting, status and error code is one that exists.

The blocks of a document run in their order, in one shell, against one service for all documents.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from PIL import Image

from shared.lifecycle import TRANSITIONS
from shared.settings import Settings
from skipline.cli import app as command_line
from skipline.recipes import RECIPES
from tests.e2e.conftest import Service

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]

NOT_RUN = {
    ("README.md", "make demo"): "installs, and is what .ci/run does before this test",
    ("README.md", "make up"): "stays until Ctrl-C; the service of these tests is one",
    ("README.md", "make test"): "is what runs this test",
    ("docs/operations.md", "skipline up --port 8000 --slots 1"): "stays until Ctrl-C",
    (
        "docs/operations.md",
        "skipline api --role predict --host 0.0.0.0 --port 8001",
    ): "stays until Ctrl-C, and needs a key",
    (
        "docs/operations.md",
        "export SKIPLINE_DATABASE_URL=postgresql://skipline:secret@db.example/skipline",
    ): "names servers that do not exist",
    ("docs/operations.md", "cp .env.example .env"): "needs a Docker engine",
    ("docs/recipes.md", "skipline train --recipe cifar10_resnet18"): "downloads CIFAR-10",
    (
        "docs/operations.md",
        "docker compose exec postgres pg_dump --username=skipline --file=/tmp/backup.sql skipline",
    ): "needs a Docker engine",
}
"""Blocks by document and first line, and why they are only read. Each of their lines is checked
to name commands, targets, services and settings that exist."""


PRINTED = {"docs/models.md": r"^\d: \d+\.\d%$"}
"""What the examples in Python print, other than that a job has succeeded."""


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def key(self) -> tuple[str, str]:
        return self.document, self.text.splitlines()[0]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_of(document: str) -> Iterator[Block]:
    text = read(document)
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        yield Block(document, line, match[1], match[2])


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
COMMANDS = [block for block in BLOCKS if block.language in ("bash", "python")]
RUN = [block for block in COMMANDS if block.key not in NOT_RUN]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to the commands, with photos beside it to train on."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / ".venv").symlink_to(sys.prefix)
    curl = folder / "bin" / "curl"
    curl.parent.mkdir()
    # A refusal is a failure here, though curl by itself ends well.
    curl.write_text('#!/bin/sh\nPATH=${PATH#*:} exec curl --fail-with-body "$@"\n')
    curl.chmod(0o755)
    rng = np.random.default_rng(0)
    for label, colour in (("cat", (200, 120, 40)), ("dog", (40, 90, 200))):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(20):
            noisy = np.clip(colour + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / "photos" / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def service(clone: Path) -> Iterator[Service]:
    """The service that the documents talk to, started in that folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SKIPLINE_")}
    environment["SKIPLINE_HOME"] = str(clone / ".skipline")
    running = Service(clone / ".skipline", environment)
    environment["SKIPLINE_API_URL"] = running.url
    path = [str(clone / "bin"), str(Path(sys.executable).parent), environment["PATH"]]
    environment["PATH"] = ":".join(path)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def run(service: Service, command: list[str], script: str) -> str:
    script = script.replace("http://127.0.0.1:8000", service.url)
    done = subprocess.run(
        command,
        input=script,
        cwd=service.home.parent,
        env=service.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def script_of(document: str, language: str) -> str:
    """The blocks of a document, each announced by its line so that a failure says where it is."""
    blocks = [block for block in RUN if (block.document, block.language) == (document, language)]
    return "\n".join(f"echo '--- {document}:{b.line}'\n{b.text}" for b in blocks)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", sorted({b.document for b in RUN if b.language == "bash"}))
def test_every_command_runs(document: str, service: Service) -> None:
    output = run(service, ["bash", "-eu", "-o", "pipefail"], script_of(document, "bash"))
    if document == "README.md":
        assert re.search(r"event: end\s+(id: \d+\s+)?data: .*succeeded", output)
        assert '"label":"7","index":7' in output
        assert (service.home.parent / "curves.png").stat().st_size > 10_000
    if document == "docs/lifecycle.md":
        assert "ended early, as asked" in output
        first, second = re.findall(r"^the job is (\S+)$", output, re.MULTILINE)
        assert first == second


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", [b for b in RUN if b.language == "python"], ids=str)
def test_every_python_example_runs(block: Block, service: Service) -> None:
    output = run(service, [sys.executable, "-W", "error", "-"], block.text)
    assert re.search(PRINTED.get(block.document, "succeeded"), output), output


def test_what_is_not_run_is_still_there() -> None:
    assert set(NOT_RUN) == {block.key for block in COMMANDS} & set(NOT_RUN)


def check_line(line: str) -> None:
    """Fails unless everything that the command names exists."""
    compose = yaml.safe_load(read("docker-compose.yml"))["services"]
    words = shlex.split(line)
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:.*## ", read("Makefile"), re.MULTILINE)
        case ["cp", source, _]:
            assert (ROOT / source).is_file()
        case ["export", assignment]:
            name = assignment.partition("=")[0]
            assert name.removeprefix("SKIPLINE_").lower() in Settings.model_fields
        case ["skipline", name, *arguments]:
            known: Any = typer.main.get_command(command_line)
            known.commands[name].make_context(name, arguments)
        case ["docker", "compose", "--profile", profile, "up", *_]:
            assert any(profile in service.get("profiles", []) for service in compose.values())
        case ["docker", "compose", "exec", service, *_]:
            assert service in compose
        case ["docker", "compose", "cp", source, _]:
            assert source.partition(":")[0] in compose
        case _:
            pytest.fail(f"nothing checks this line: {line}")


@pytest.mark.parametrize("block", [b for b in COMMANDS if b.key in NOT_RUN], ids=str)
def test_what_is_not_run_names_what_exists(block: Block) -> None:
    for line in block.text.splitlines():
        check_line(line)


def test_every_block_of_commands_is_looked_at() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "mermaid"}


def anchors(document: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", read(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)]+)\)", read(document)):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (folder / path).resolve() if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


def test_every_decision_is_listed() -> None:
    there = {path.name for path in (ROOT / "docs/decisions").iterdir()}
    assert there == set(re.findall(r"decisions/(\d{4}-[\w-]+\.md)", read("docs/architecture.md")))


def shown_default(name: str, default: object) -> str:
    if name.endswith("_bytes"):
        assert isinstance(default, int)
        return f"{default // 2**20} MiB"
    return f"`{default}`" if isinstance(default, str | Path) else str(default).removesuffix(".0")


def test_the_table_of_settings_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `SKIPLINE_(\w+)` \| (.+?) \|", read("docs/operations.md"), re.MULTILINE)
    documented = {name.lower(): default for name, default in rows}
    assert list(documented) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if field.default is not None and field.default != ():
            assert documented[name] == shown_default(name, field.default), name


def test_the_picture_of_the_states_is_the_table_of_transitions() -> None:
    (picture,) = [b for b in blocks_of("docs/lifecycle.md") if b.language == "mermaid"]
    arrows = set(re.findall(r"^\s+(\w+) --> (\w+)$", picture.text, re.MULTILINE))
    assert arrows == {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}


def test_the_list_of_recipes_is_complete_and_right() -> None:
    row = r"^\| `(\w+)` \| .+? \| .+? \| (\d+) \| (\d+) \|"
    rows = re.findall(row, read("docs/recipes.md"), re.MULTILINE)
    shown = {name: (int(size), int(epochs)) for name, size, epochs in rows}
    assert shown == {
        name: (
            recipe.spec.get("image_size", recipe.dataset_image_size),
            recipe.spec["epochs"],
        )
        for name, recipe in RECIPES.items()
    }


REFUSALS_THAT_END_JOBS = {
    "checkpoint_corrupt",
    "invalid_spec",
    "model_not_found",
    "no_checkpoint_yet",
}
"""Codes of refused requests that a job ends with where it finds out only when it begins."""


def explained_codes() -> set[str]:
    """The first column of every table that is headed `error.code`."""
    table = r"^\| `error\.code` \|.*\n\|[-|]+\n((?:\|.*\n)+)"
    rows = "".join("".join(re.findall(table, read(name), re.MULTILINE)) for name in DOCUMENTS)
    cells = re.findall(r"^\| (`.+?) \|", rows, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


def codes_in(tree: ast.AST) -> Iterator[str]:
    """The codes of a job's `error`, where they are written into a source file."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Name(id="TrainingError"), args=[ast.Constant(value=str(code)), *_]
            ):
                yield code
            case ast.Dict(
                keys=[ast.Constant(value="code"), *_], values=[ast.Constant(value=str(code)), *_]
            ):
                yield code


def test_every_error_code_is_explained() -> None:
    sources = [
        path.read_text() for part in ("shared", "worker") for path in (ROOT / part).rglob("*.py")
    ]
    raised = {code for source in sources for code in codes_in(ast.parse(source))}
    assert {"nan_loss", "no_images", "stalled", "worker_lost"} <= raised
    assert raised - explained_codes() == set()
    assert explained_codes() - raised == REFUSALS_THAT_END_JOBS
    text = "".join(sources) + read("skipline/catalog.py")
    assert {code for code in REFUSALS_THAT_END_JOBS if f'"{code}"' not in text} == set()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(
        r"`((?:skipline|shared|api|worker|tests)/[\w/]*\.py)`", read("docs/architecture.md")
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
