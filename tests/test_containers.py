"""Dockerfile.gpu and docker-compose.yml, without a Docker engine.

The first part reads both files and holds them against rules. The last test starts the services'
very commands, with their very environment, as processes of this machine: only the names of hosts,
ports and folders are mapped. PostgreSQL and Redis are real ones.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.main
import yaml
from sqlalchemy import make_url

from shared.settings import Settings
from skipline import Skipline, SkiplineError
from skipline.cli import app as command_line
from skipline.schemas import JobStatus
from tests.e2e.conftest import free_port, wait_for

ROOT = Path(__file__).parent.parent
OURS = ("migrate", "api", "worker", "worker-cpu")
GIVEN = {"POSTGRES_PASSWORD": "p4ssw0rd", "SKIPLINE_API_KEY": "k" * 64}


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, rest), comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    steps = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest) for name, rest in steps]


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}` and `${NAME:?message}`, as docker compose reads them.

    Raises:
        KeyError: a variable that must be given is not.
    """

    def value(match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        if given := variables.get(name):
            return given
        if how != ":-":
            raise KeyError(f"{name}: {rest}")
        return str(rest)

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def compose(**variables: str) -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text()
    return dict(yaml.safe_load(interpolate(text, {**GIVEN, **variables})))


def environment_of_the_image() -> dict[str, str]:
    steps = instructions((ROOT / "Dockerfile.gpu").read_text())
    pairs = [pair for name, rest in steps if name == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


DOCKERFILE = instructions((ROOT / "Dockerfile.gpu").read_text())
SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def steps_with(*words: str) -> list[int]:
    """The places of the Dockerfile's steps that hold all of `words`."""
    whole = [f"{name} {rest}" for name, rest in DOCKERFILE]
    return [i for i, step in enumerate(whole) if all(word in step for word in words)]


def test_no_image_floats() -> None:
    images = [rest for name, rest in DOCKERFILE if name == "FROM"]
    images += [service["image"] for service in SERVICES.values() if "build" not in service]
    assert len(images) == 3
    for image in images:
        tag = image.partition(":")[2]
        assert re.search(r"\d+\.\d+|\d+-", tag), f"{image} names no version"


def test_the_image_runs_as_a_user_without_rights() -> None:
    users = [(place, rest) for place, (name, rest) in enumerate(DOCKERFILE) if name == "USER"]
    assert [user for _, user in users] == ["skipline"]
    assert all(name != "RUN" for name, _ in DOCKERFILE[users[0][0] :])
    assert steps_with("RUN useradd", "--uid 1000", "skipline")
    for name in OURS:
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert "user" not in SERVICES[name]
        assert not SERVICES[name].get("privileged")


def test_the_libraries_are_a_layer_that_does_not_change_with_the_code() -> None:
    (libraries,) = steps_with("RUN", "pip install", "-c constraints.txt", "[server,onnx]")
    copies = [(place, rest) for place, (name, rest) in enumerate(DOCKERFILE) if name == "COPY"]
    before = [rest for place, rest in copies if place < libraries]
    assert before == ["pyproject.toml constraints.txt ./"]
    assert [rest for place, rest in copies if place > libraries] == [". ."]
    assert len(steps_with("pip install", "--mount=type=cache,target=/var/cache/pip")) == 2


def test_the_image_has_what_torch_compile_and_the_gpu_runtime_need() -> None:
    assert steps_with("apt-get install", "gcc", "libc6-dev", "rm -rf /var/lib/apt/lists/*")
    environment = environment_of_the_image()
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert set(environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}


def is_ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps this path out of the build: the last rule that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").rstrip("/").replace("**/", "*")
        if fnmatch(path, pattern) or fnmatch(path, f"{pattern}/*"):
            ignored = not line.startswith("!")
    return ignored


def test_secrets_and_data_stay_out_of_the_image_and_all_code_gets_in() -> None:
    left_out = [".env", ".git/config", ".venv/bin/python", ".skipline/skipline.sqlite3"]
    left_out += ["tests/conftest.py", "datasets/a/1.png", "shared/__pycache__/x.pyc"]
    assert [path for path in left_out if not is_ignored(path)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = [f"{package.rstrip('*')}/x.py" for package in packages]
    needed += ["migrations/script.py.mako", "pyproject.toml", "constraints.txt"]
    needed += [project["project"]["readme"], *project["project"]["license-files"]]
    assert [path for path in needed if is_ignored(path)] == []


def test_every_variable_is_a_setting() -> None:
    known = {f"SKIPLINE_{name.upper()}" for name in Settings.model_fields}
    environments = [environment_of_the_image()]
    environments += [SERVICES[name]["environment"] for name in OURS]
    named = {name for each in environments for name in each if name.startswith("SKIPLINE_")}
    assert named >= {"SKIPLINE_DATABASE_URL", "SKIPLINE_BROKER_URL", "SKIPLINE_HOME"}
    assert named - known == set()


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_secrets_must_be_given(name: str) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    without = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(KeyError, match=name):
        interpolate(text, without)


def test_the_example_of_env_names_every_variable() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text)) | {"COMPOSE_PROFILES"}
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^#?(\w+)=", example, re.MULTILINE)) == used


def test_the_api_is_published_on_loopback_unless_asked() -> None:
    assert SERVICES["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert compose(PUBLISH="10.0.0.1:80")["services"]["api"]["ports"] == ["10.0.0.1:80:8000"]
    assert all("ports" not in SERVICES[name] for name in SERVICES if name != "api")
    assert ("EXPOSE", "8000") in DOCKERFILE


def commands() -> list[list[str]]:
    (of_the_image,) = [json.loads(rest) for name, rest in DOCKERFILE if name == "CMD"]
    return [of_the_image, *(SERVICES[name]["command"] for name in OURS)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_is_one_that_skipline_has(command: list[str]) -> None:
    program, name, *arguments = command
    assert program == "skipline"
    known: Any = typer.main.get_command(command_line)
    known.commands[name].make_context(name, arguments)  # Raises on an unknown option.


def test_services_wait_for_what_they_need() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed]
            else:
                assert how["condition"] == "service_completed_successfully"
                assert SERVICES[needed]["restart"] == "no"
    for name in ("api", "worker", "worker-cpu"):
        assert set(SERVICES[name]["depends_on"]) == {"migrate", "redis"}
        assert SERVICES[name]["restart"] == "unless-stopped"
    assert set(SERVICES["migrate"]["depends_on"]) == {"postgres"}


def test_a_worker_gets_its_grace_before_docker_kills_it() -> None:
    grace = Settings.model_fields["grace_seconds"].default
    for name in ("worker", "worker-cpu"):
        assert seconds(SERVICES[name]["stop_grace_period"]) >= grace + 15
        assert SERVICES[name]["init"] is True


def test_redis_keeps_an_append_only_file_on_a_volume() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_the_worker_reserves_a_gpu_and_the_cpu_profile_needs_none() -> None:
    (gpu,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["worker"]["profiles"] == ["gpu"]
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    differ = {
        key
        for key in SERVICES["worker"]
        if SERVICES["worker-cpu"].get(key) != SERVICES["worker"][key]
    }
    assert differ == {"profiles", "environment", "deploy"}


def test_volumes_are_declared_and_hold_what_the_environment_says() -> None:
    declared = set(compose()["volumes"])
    mounts = {name: dict(mounts_of(service)) for name, service in SERVICES.items()}
    named = {source for each in mounts.values() for source in each.values()}
    assert {source for source in named if not source.startswith(".")} == declared
    for name in OURS:
        environment = SERVICES[name]["environment"]
        artifacts = urlsplit(environment["SKIPLINE_ARTIFACTS_URL"]).path
        assert mounts[name][artifacts] == "artifacts"
        assert mounts[name][environment["SKIPLINE_HOME"]] == "home"
        assert environment["SKIPLINE_DATASET_ROOTS"] in mounts[name]
        assert "./datasets:/datasets:ro" in SERVICES[name]["volumes"]
    # Docker gives a new volume the owner of the folder in the image.
    (made,) = steps_with("RUN useradd", "install --directory --owner=skipline")
    for folder in ("/var/lib/skipline/home", "/var/lib/skipline/artifacts"):
        assert folder in DOCKERFILE[made][1].split()


def mounts_of(service: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in service.get("volumes", []):
        source, target, *_ = volume.split(":")
        yield target, source


class Mapped:
    """The services as processes of this machine. What differs between a container and here is
    mapped in every command and variable: hosts, the port, folders, and where programs are."""

    def __init__(self, folder: Path, postgres_url: str, redis_url: str) -> None:
        self.port = free_port()
        self.folder = folder
        for name in ("home", "artifacts", "datasets"):
            (folder / name).mkdir()
        redis = urlsplit(redis_url)
        self.replacements = {
            SERVICES["api"]["environment"]["SKIPLINE_DATABASE_URL"]: postgres_url,
            SERVICES["api"]["environment"]["SKIPLINE_BROKER_URL"]: redis_url,
            "/var/lib/skipline": str(folder),
            "/datasets": str(folder / "datasets"),
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
        }
        self.programs = {
            "skipline": [str(Path(sys.executable).with_name("skipline"))],
            "python": [sys.executable],
            "pg_isready": ["pg_isready", f"--host={make_url(postgres_url).host}"],
            "redis-cli": ["redis-cli", "-h", str(redis.hostname), "-p", str(redis.port or 6379)],
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def text(self, text: str) -> str:
        for theirs, ours in self.replacements.items():
            text = text.replace(theirs, ours)
        return text

    def command(self, words: list[str]) -> list[str]:
        program, *arguments = words
        mapped = [self.text(argument) for argument in arguments]
        if "--port" in mapped:
            mapped[mapped.index("--port") + 1] = str(self.port)
        return [*self.programs[program], *mapped]

    def environment(self, name: str) -> dict[str, str]:
        """What the image and the service set, and nothing of this process but where programs and
        the home folder are."""
        theirs = environment_of_the_image() | SERVICES[name]["environment"]
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return inherited | {name: self.text(value) for name, value in theirs.items()}

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.command(SERVICES[name]["command"]),
                env=self.environment(name),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def wait_until_healthy(self, name: str) -> None:
        """As Docker does: its command, until it succeeds, for as long as the file allows."""
        check = SERVICES[name]["healthcheck"]
        how, *words = check["test"]
        assert how == "CMD"
        allowed = seconds(check.get("start_period", "0s"))
        allowed += int(check["retries"]) * seconds(check["interval"])

        def is_healthy() -> bool:
            if name in self.running:
                assert self.running[name].poll() is None, self.log(name)
            done = subprocess.run(
                self.command(words), capture_output=True, timeout=seconds(check["timeout"])
            )
            return done.returncode == 0

        wait_for(is_healthy, f"healthy {name}", allowed)

    def stop(self, name: str) -> None:
        """SIGTERM, and the time that the file gives."""
        process = self.running.pop(name)
        process.terminate()
        code = process.wait(seconds(SERVICES[name]["stop_grace_period"]))
        # uvicorn ends in order, and then by the signal that it was sent.
        assert code in (0, -signal.SIGTERM), self.log(name)

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def services(tmp_path: Path, postgres_schema_url: str, redis_url: str) -> Iterator[Mapped]:
    mapped = Mapped(tmp_path, postgres_schema_url, redis_url)
    yield mapped
    mapped.kill()


def test_the_services_start_and_run_a_job(services: Mapped) -> None:
    for name, program in (("postgres", "pg_isready"), ("redis", "redis-cli")):
        if shutil.which(program):  # The servers are given; their clients may not be installed.
            services.wait_until_healthy(name)
    services.start("migrate")
    assert services.running.pop("migrate").wait(60) == 0, services.log("migrate")
    services.start("api")
    services.start("worker-cpu")
    services.wait_until_healthy("api")

    url = f"http://127.0.0.1:{services.port}"
    with Skipline(url, api_key="another") as stranger, pytest.raises(SkiplineError) as refused:
        list(stranger.jobs())
    assert refused.value.status == 401
    with Skipline(url, api_key=GIVEN["SKIPLINE_API_KEY"]) as client:
        job = client.train(dataset="digits", image_size=8, epochs=1, batch_size=64)
        done = client.wait(job.id)
        assert done.status is JobStatus.succeeded, done.error
        image = ROOT / "docs" / "images" / "seven.png"
        answer = client.predict([image], model=job.id)
        assert answer.model.job_id == job.id

    # The folders of the volumes hold the state, and nothing lies beside them.
    assert list((services.folder / "artifacts" / "jobs" / job.id).iterdir())
    assert (services.folder / "home" / "cache").is_dir()
    made = {path.name for path in services.folder.iterdir() if path.is_dir()}
    assert made == {"home", "artifacts", "datasets"}
    services.stop("worker-cpu")
    services.stop("api")
