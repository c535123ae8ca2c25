"""Small images and trees of class folders, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from shared.settings import Settings

Colour = tuple[int, int, int]
MakeImage = Callable[..., bytes]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", dataset_roots=(tmp_path,), cpu_threads=2)


@pytest.fixture(scope="session")
def image() -> MakeImage:
    """`image(number, size)`: a PNG of one colour, a different one for each number."""

    def make(number: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
        file = BytesIO()
        Image.new("RGB", size, (number % 256, number // 256, 7)).save(file, "PNG")
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def tree() -> MakeTree:
    """`tree(root, files)` writes the files by their relative paths, in that order."""

    def make(root: Path, files: Mapping[str, bytes]) -> Path:
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    return make
