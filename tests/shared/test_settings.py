"""What the environment says, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.settings import Settings, get_settings


def settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg, arg-type]


def test_everything_lies_below_the_home_folder_by_default(tmp_path: Path) -> None:
    own = settings(home=tmp_path)
    assert own.database == f"sqlite:///{tmp_path}/skipline.sqlite3"
    assert own.artifacts_path == tmp_path / "artifacts"
    assert own.broker == "filesystem://localhost"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_each_spelling_of_postgresql_takes_the_same_driver(scheme: str) -> None:
    url = settings(database_url=f"{scheme}://me@host/name").database
    assert url == "postgresql+psycopg://me@host/name"


def test_artifacts_lie_in_a_folder_named_as_a_file_url() -> None:
    assert settings(artifacts_url="file:///a%20b/c").artifacts_path == Path("/a b/c")


@pytest.mark.parametrize("url", ["s3://bucket/x", "file://host/x", "/plain/path"])
def test_other_urls_of_artifacts_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="SKIPLINE_ARTIFACTS_URL"):
        _ = settings(artifacts_url=url).artifacts_path


def test_variables_and_a_dotenv_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SKIPLINE_API_KEY=secret\nSKIPLINE_LEASE_SECONDS=90\n")
    monkeypatch.setenv("SKIPLINE_LEASE_SECONDS", "120")
    monkeypatch.setenv("SKIPLINE_DATASET_ROOTS", f"{tmp_path}:/data")
    get_settings.cache_clear()
    own = get_settings()
    get_settings.cache_clear()
    assert own.api_key is not None
    assert own.api_key.get_secret_value() == "secret"
    assert own.lease_seconds == 120
    assert own.resolved_dataset_roots == (tmp_path.resolve(), Path("/data").resolve())
    assert "secret" not in repr(own)


def test_a_limit_cannot_be_switched_off() -> None:
    with pytest.raises(ValidationError):
        settings(max_body_bytes=0)


def test_a_lease_outlives_several_renewals() -> None:
    assert settings(lease_seconds=8, renew_seconds=2).renew_seconds == 2
    with pytest.raises(ValidationError, match="a quarter of SKIPLINE_LEASE_SECONDS"):
        settings(lease_seconds=59)
