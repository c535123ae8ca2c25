from __future__ import annotations

import gzip
import io
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from shared.errors import TrainingError
from shared.settings import Settings
from worker.datasets import archives
from worker.datasets.archives import open_archive, zstd

FILES = {"cat/1": b"one", "cat/2": b"two", "dog/1": b"one more"}
SUFFIXES = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"]


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def plain(name: str, data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def make(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        return make_zip(path, files)
    compression = path.suffix.removeprefix(".")
    if compression == "zst":
        tar = make(path.with_suffix(".tar"), files)
        options = {zstd.CompressionParameter.checksum_flag: 1}
        path.write_bytes(zstd.compress(tar.read_bytes(), options=options))
        tar.unlink()
        return path
    mode = "w" if compression == "tar" else f"w:{compression}"
    return make_tar(path, *(plain(name, data) for name, data in files.items()), mode=mode)


def code_of(path: Path, settings: Settings) -> str:
    """The code that reading the archive to its end fails with."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(TrainingError) as caught:
        list(open_archive(path, settings))
    assert caught.value.hint
    assert str(path.parent) not in caught.value.message + caught.value.hint
    assert sorted(path.parent.rglob("*")) == before
    return caught.value.code


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_come_in_their_order(tmp_path: Path, settings: Settings, suffix: str) -> None:
    source = open_archive(make(tmp_path / f"a.{suffix}", FILES), settings)
    found = [(image.split, image.label, image.path, image.data) for image in source]
    assert found == [
        ("train", "cat", "cat/1", b"one"),
        ("train", "cat", "cat/2", b"two"),
        ("train", "dog", "dog/1", b"one more"),
    ]
    assert (source.num_images, source.num_bytes) == (3, 14)
    assert source.class_folders == {("train", "cat"), ("train", "dog")}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_top_folder_is_taken_away_and_junk_left_out(
    tmp_path: Path, settings: Settings, suffix: str
) -> None:
    files = {
        "./d/train/cat/1": b"1",
        "d/val/cat/deep/2": b"2",
        "d/val/readme.txt": b"",
        "d/.DS_Store": b"",
        "__MACOSX/d/train/cat/._1": b"",
        "d/train/cat/Thumbs.db": b"",
    }
    source = open_archive(make(tmp_path / f"a.{suffix}", files), settings)
    assert [(image.split, image.label, image.path) for image in source] == [
        ("train", "cat", "d/train/cat/1"),
        ("val", "cat", "d/val/cat/deep/2"),
    ]


def test_files_of_whole_tar_blocks_are_read_whole(tmp_path: Path, settings: Settings) -> None:
    files = {f"cat/{i}": bytes([i]) * 512 * i for i in range(40)}
    source = open_archive(make(tmp_path / "a.tar.gz", files), settings)
    assert {image.path: image.data for image in source} == files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "cat/../../evil",
        "/etc/evil",
        "C:/evil",
        "C:evil",
        "\\evil",
        "..\\evil",
        "cat/..",
    ],
)
def test_paths_that_lead_out_are_unsafe(
    tmp_path: Path, settings: Settings, suffix: str, name: str
) -> None:
    assert code_of(make(tmp_path / f"a.{suffix}", FILES | {name: b""}), settings) == (
        "unsafe_archive"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name", ["CAT/1", "Cat/9", "dog/1/x", "cat", "cat//1", "cat\\1", "./cat/1", "DOG"]
)
def test_paths_that_meet_on_some_file_system_are_unsafe(
    tmp_path: Path, settings: Settings, suffix: str, name: str
) -> None:
    archive = make(tmp_path / f"a.{suffix}", FILES | {name: b""})
    assert code_of(archive, settings) == "unsafe_archive"


def test_composed_and_decomposed_spellings_meet(tmp_path: Path, settings: Settings) -> None:
    archive = make_zip(tmp_path / "a.zip", {"caf\u00e9/1": b"", "cafe\u0301/1": b""})
    assert code_of(archive, settings) == "unsafe_archive"


def test_a_member_that_is_there_twice_is_unsafe(tmp_path: Path, settings: Settings) -> None:
    twice = make_tar(tmp_path / "a.tar", plain("cat/1", b"1"), plain("cat/1", b"2"))
    assert code_of(twice, settings) == "unsafe_archive"
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("cat/1", b"1")
        archive.writestr("cat/1", b"2")
    assert code_of(tmp_path / "a.zip", settings) == "unsafe_archive"


def test_the_same_folder_twice_is_fine(tmp_path: Path, settings: Settings) -> None:
    folder = special("cat", tarfile.DIRTYPE)
    archive = make_tar(tmp_path / "a.tar", folder, plain("cat/1"), folder)
    assert open_archive(archive, settings).num_images == 1


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.CONTTYPE,
    ],
)
def test_tar_members_other_than_files_and_folders_are_unsafe(
    tmp_path: Path, settings: Settings, kind: bytes
) -> None:
    archive = make_tar(tmp_path / "a.tar", plain("cat/1"), special("cat/2", kind, "1"))
    assert code_of(archive, settings) == "unsafe_archive"


@pytest.mark.parametrize("kind", [0o120000, 0o010000, 0o060000, 0o040000])
def test_zip_members_other_than_files_and_folders_are_unsafe(
    tmp_path: Path, settings: Settings, kind: int
) -> None:
    info = zipfile.ZipInfo("cat/2")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/1", b"")
        archive.writestr(info, b"/etc/passwd")
    assert code_of(tmp_path / "a.zip", settings) == "unsafe_archive"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_cut_anywhere_is_bad(tmp_path: Path, settings: Settings, suffix: str) -> None:
    files = {f"cat/{i}": bytes(range(256)) * 5 for i in range(4)}
    whole = make(tmp_path / f"a.{suffix}", files).read_bytes()
    # A tar ends at its first empty block; the padding behind that one may be missing.
    end = 4 * (512 + 1536) if suffix == "tar" else len(whole) - 1
    for length in range(0, end, max(1, end // 40)):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole[:length])
        assert code_of(cut, settings) == "bad_archive", length


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_flipped_byte_is_found(tmp_path: Path, settings: Settings, suffix: str) -> None:
    path = make(tmp_path / f"a.{suffix}", {"cat/1": bytes(range(256)) * 4})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if suffix != "zip" else 200] ^= 0xFF
    path.write_bytes(data)
    assert code_of(path, settings) == "bad_archive"


def test_an_encrypted_zip_is_bad(tmp_path: Path, settings: Settings) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    data = bytearray(path.read_bytes())
    listed = data.index(b"PK\x01\x02")
    data[listed + 8] |= 1
    path.write_bytes(data)
    assert code_of(path, settings) == "bad_archive"


@pytest.mark.parametrize("claimed", [1, 2, 4, 1000])
def test_a_zip_that_lies_about_a_size_is_bad(
    tmp_path: Path, settings: Settings, claimed: int
) -> None:
    path = make_zip(tmp_path / "a.zip", {"cat/1": b"one"}, compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, claimed)
    path.write_bytes(data)
    assert code_of(path, settings) == "bad_archive"


@pytest.mark.parametrize("data", [b"", b"hello", b"x" * 2000, b"\x1f\x8bnope", b"PK\x03\x04nope"])
def test_what_is_no_archive_is_bad(tmp_path: Path, settings: Settings, data: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    assert code_of(path, settings) == "bad_archive"


def test_a_zip_bomb_is_too_large_before_anything_is_read(
    tmp_path: Path, settings: Settings
) -> None:
    files = {f"cat/{i}": bytes(2**24) for i in range(5)}
    path = make_zip(tmp_path / "a.zip", files, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size * 200 < 5 * 2**24
    assert code_of(path, settings) == "archive_too_large"


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_a_tar_bomb_is_too_large_whatever_it_is_made_of(
    tmp_path: Path, settings: Settings, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 2**20)
    in_a_class = make(tmp_path / f"a.{suffix}", {"cat/1": bytes(2**23)})
    assert code_of(in_a_class, settings) == "archive_too_large"
    beside_classes = make(tmp_path / f"b.{suffix}", {"zeros": bytes(2**23)} | FILES)
    assert code_of(beside_classes, settings) == "archive_too_large"


def test_a_bomb_behind_the_end_of_a_tar_is_too_large(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 2**20)
    tar = make(tmp_path / "a.tar", FILES).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar + bytes(2**23)))
    assert code_of(tmp_path / "a.tar.gz", settings) == "archive_too_large"


def test_a_tar_header_of_many_megabytes_is_not_read_into_memory(
    tmp_path: Path, settings: Settings
) -> None:
    name, _ = plain("cat/1")
    name.name = "cat/" + "x" * 2**21  # becomes an extended header
    path = make_tar(tmp_path / "a.tar", (name, b""))
    assert code_of(path, settings) == "bad_archive"


@pytest.mark.parametrize("name", ["cat/1", "words.txt"])
def test_a_negative_size_in_a_tar_reads_nothing(
    tmp_path: Path, settings: Settings, name: str
) -> None:
    info, _ = plain(name)
    info.size = -1
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(info)
        archive.addfile(plain("dog/1")[0])
    with pytest.raises(TrainingError, match="a negative size") as caught:
        open_archive(tmp_path / "a.tar.gz", settings)
    assert caught.value.code == "bad_archive"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_too_many_entries_and_too_many_bytes_are_refused(
    tmp_path: Path, settings: Settings, suffix: str
) -> None:
    path = make(tmp_path / f"a.{suffix}", {f"cat/{i}": b"x" * 1000 for i in range(10)})
    for limit in ({"max_dataset_images": 9}, {"max_dataset_bytes": 9000}):
        assert code_of(path, settings.model_copy(update=limit)) == "archive_too_large"


def test_a_zip_with_a_long_list_is_refused_before_the_list_is_read(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(tmp_path / "a.zip", {f"cat/{i:0200}": b"" for i in range(20)})
    monkeypatch.setattr(zipfile, "ZipFile", None)
    few = settings.model_copy(update={"max_dataset_images": 10})
    assert code_of(path, few) == "archive_too_large"


def test_one_huge_member_in_a_class_is_too_large(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 7)
    for suffix in SUFFIXES:
        path = make(tmp_path / f"a.{suffix}", FILES)
        with pytest.raises(TrainingError, match="dog/1") as caught:
            open_archive(path, settings)
        assert caught.value.code == "archive_too_large"


def test_an_empty_archive_has_no_images(tmp_path: Path, settings: Settings) -> None:
    for suffix in SUFFIXES:
        assert open_archive(make(tmp_path / f"a.{suffix}", {}), settings).num_images == 0


def test_a_zstd_frame_that_asks_for_gigabytes_is_bad(tmp_path: Path, settings: Settings) -> None:
    tar = make(tmp_path / "a.tar", FILES).read_bytes()
    options = {zstd.CompressionParameter.window_log: 30}
    compressor = zstd.ZstdCompressor(options=options)  # which does not know how little will come
    path = tmp_path / "a.tar.zst"
    path.write_bytes(compressor.compress(tar) + compressor.flush())
    assert code_of(path, settings) == "bad_archive"


@settings_of_hypothesis(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_whatever_bytes_are_changed_an_archive_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    path = make(folder / f"a.{suffix}", FILES)
    data = bytearray(path.read_bytes())
    for place, change in flips:
        data[place % len(data)] ^= change
    path.write_bytes(data)
    try:
        images = list(open_archive(path, Settings(home=folder)))
    except TrainingError:
        images = []
    assert len(images) <= len(FILES)
    assert [p.name for p in folder.iterdir()] == [path.name]
