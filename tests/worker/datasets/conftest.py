"""Small images and trees of class folders, made by hand."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from shared.settings import Settings
from worker.datasets.archives import open_archive
from worker.datasets.folders import open_folder
from worker.datasets.layout import Source

Colour = tuple[int, int, int]
MakeImage = Callable[..., bytes]
MakeTree = Callable[[Path, Mapping[str, bytes]], Path]
OpenTree = Callable[[Mapping[str, bytes]], Source]


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


@pytest.fixture(params=["folder", "zip", "tar.gz"])
def open_tree(
    request: pytest.FixtureRequest, tmp_path: Path, tree: MakeTree, settings: Settings
) -> OpenTree:
    """`open_tree(files)`: the source that a tree of these files is, as a folder and archived."""

    def run(files: Mapping[str, bytes]) -> Source:
        path = tmp_path / f"tree.{request.param}"
        if request.param == "folder":
            return open_folder(tree(path, files), settings)
        if request.param == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
        else:
            with tarfile.open(path, "w:gz") as tar:
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
        return open_archive(path, settings)

    return run
