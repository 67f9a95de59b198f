"""Files appear whole or not at all, and nothing but `owl_det.files` opens them."""

import ast
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import data_pipelines
import owl_det
from owl_det import files
from owl_det.errors import UserError

# What these modules do with file descriptors is not reading or writing.
_EXCEPTIONS = {
    "owl_det/console.py": "puts the null device in the place of the standard output",
    "owl_det/training/lease.py": "a lock belongs to the descriptor of its file",
}

_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "rename"}
_FUNCTIONS = {
    "os": {"open", "fdopen", "replace", "rename", "link"},
    "io": {"open", "FileIO"},
    "shutil": {"copy", "copy2", "copyfile", "move"},
    "tempfile": {"mkdtemp", "mkstemp", "NamedTemporaryFile"},
    "np": {"load", "save", "savez", "memmap", "fromfile"},
}


@pytest.mark.parametrize(
    "address",
    ["gs://bucket/x", "s3://bucket/x", "https://example.com/a.jpg", "gs:/bucket/x", "hdfs:///x"],
)
def test_an_address_is_refused_and_named(address: str) -> None:
    with pytest.raises(UserError, match=f"^--out: {address} is an address"):
        files.local(address, "--out")
    with pytest.raises(UserError, match=f"^{address} is an address"):
        files.local(Path(address) if "//" not in address else address)


@pytest.mark.parametrize(
    "use",
    [files.read_bytes, files.fetch, files.sha256, files.open_append, files.open_write],
    ids=lambda use: use.__name__,
)
def test_an_address_is_neither_read_nor_written(use: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="^gs://bucket/x is an address"):
        use("gs://bucket/x")


@pytest.mark.parametrize("text", ["a/b", "/a:/b", "shapes_world:train:20", "a:1,2,3,4", "./gs:/x"])
def test_what_only_looks_like_an_address_is_a_path(text: str) -> None:
    assert files.local(text) == Path(text)


def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert files.local("~/runs") == Path("/home/somebody/runs")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.json"
    files.write_atomic(target, "ä")
    assert target.read_bytes() == b"\xc3\xa4"
    with pytest.raises(RuntimeError), files.atomic(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text("utf-8") == "ä"
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("fsync", [False, True])
def test_content_is_on_disk_before_the_name_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    seen: list[tuple[int, bool]] = []  # bytes of the file that was synced; was its name there?
    target = tmp_path / "a"

    def synced(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, target.exists()))

    monkeypatch.setattr(os, "fsync", synced)
    files.write_atomic(target, b"12345", fsync=fsync)
    assert seen == ([(5, False)] if fsync else [])


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        files.write_atomic(tmp_path / "a", "x")
    assert (raised.value.strerror, raised.value.filename) == ("Is a directory", f"{tmp_path}/a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_file_is_written_once(tmp_path: Path) -> None:
    target = tmp_path / "new" / "job.json"
    assert files.write_new(target, "first")
    assert not files.write_new(target, "second")
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["job.json"]


def test_a_new_file_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    assert files.write_new(tmp_path / "job.json", b"first")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("job.json", "first")]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), files.atomic_folder(target) as partial:
        (partial / "half").write_text("")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    (target.parent / "out.partial").mkdir()  # of a run that was killed
    (target.parent / "out.partial" / "half").write_text("")
    target.mkdir()  # an empty one may be there
    with files.atomic_folder(target) as partial:
        (partial / "a").write_text("whole")
        assert list(target.iterdir()) == []
    assert [path.name for path in target.iterdir()] == ["a"]
    with pytest.raises(OSError, match="not empty"), files.atomic_folder(target):
        pass
    assert (target / "a").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with files.open_append(file) as log:
        log.write(b"\xef\xbb\xbf12")
    with files.open_append(file) as log:
        log.write(b"34\r\n")
    assert files.read_bytes(file) == b"\xef\xbb\xbf1234\r\n"
    assert files.read_text(file, "utf-8-sig") == "1234\r\n"
    with files.open_read(file) as opened:
        assert opened.read(4) == b"\xef\xbb\xbf1"
    assert files.open_range(file, 4, 2) == b"23"
    assert files.open_range(file, 6, 99) == b"4\r\n"
    assert files.open_range(file, 99, 1) == b""
    assert files.fetch(file) == file
    assert files.sha256(file) == hashlib.sha256(b"\xef\xbb\xbf1234\r\n").hexdigest()
    with files.open_write(file) as opened:
        opened.write(b"5")
    assert file.read_bytes() == b"5"


def test_errors_are_those_of_the_system(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as raised:
        files.read_bytes(absent)
    assert str(raised.value) == f"[Errno 2] No such file or directory: '{absent}'"
    assert (raised.value.strerror, raised.value.filename) == (
        "No such file or directory",
        str(absent),
    )


def test_another_spelling_is_found(tmp_path: Path) -> None:
    (tmp_path / "Sub").mkdir()
    (tmp_path / "Sub" / "IMG.JPG").write_bytes(b"")
    meant = f"; did you mean '{tmp_path}/Sub/IMG.JPG'?"
    assert files.did_you_mean(tmp_path / "sub" / "img.jpeg") == meant
    assert files.did_you_mean(f"{tmp_path}\\Sub\\IMG.JPG") == meant
    assert files.did_you_mean(tmp_path / "sub" / "other.jpg") == ""


def test_modules_open_files_through_one_module() -> None:
    found: dict[str, list[str]] = {}
    for package in (owl_det, data_pipelines):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            name = file.relative_to(root.parent).as_posix()
            if name != "owl_det/files.py":
                found[name] = [f"line {line}: {call}" for line, call in _own_calls(file)]
    assert len(found) > 150  # the library, not an empty folder
    assert {name for name in _EXCEPTIONS if not found[name]} == set()
    assert {n: calls for n, calls in found.items() if calls and n not in _EXCEPTIONS} == {}


@pytest.mark.parametrize(
    ("code", "is_refused"),
    [
        ("open(path)", True),
        ("path.open('rb')", True),
        ("path.open(mode='w')", True),
        ("path.open()", True),
        ("Path(path).read_text()", True),
        ("self.path.write_bytes(b'')", True),
        ("partial.replace(path)", True),
        ("partial.rename(path)", True),
        ("os.replace(partial, path)", True),
        ("shutil.copyfile(path, partial)", True),
        ("np.load(path)", True),
        ("files.read_text(path)", False),
        ("text.replace('a', 'b')", False),
        ("dataclasses.replace(x, a=1)", False),
        ("archive.open(member)", False),
        ("tarfile.open(path, 'r:')", False),
    ],
)
def test_the_rule_knows_a_file_that_is_opened(tmp_path: Path, code: str, is_refused: bool) -> None:
    (tmp_path / "module.py").write_text(f"import tarfile\nfrom owl_det import files\n{code}\n")
    assert bool(list(_own_calls(tmp_path / "module.py"))) == is_refused


def _own_calls(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each call in a module that opens, reads, writes or renames a file."""
    tree = ast.parse(file.read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _opens_a_file(node, imported):
            yield node.lineno, ast.unparse(node)


def _opens_a_file(call: ast.Call, imported: set[str]) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id == "open"
    if not isinstance(function, ast.Attribute):
        return False
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    if function.attr in _FUNCTIONS.get(owner, ()):
        return True
    if owner in imported:  # a function of a module, such as `files.read_text`
        return False
    if function.attr == "open":  # a path's has a mode at most, an archive's names a member
        return all(isinstance(argument, ast.Constant) for argument in call.args)
    if function.attr == "replace":  # a text's has two arguments
        return len(call.args) == 1 and not call.keywords
    return function.attr in _METHODS
