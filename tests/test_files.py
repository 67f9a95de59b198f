from pathlib import Path

import pytest

from owl_det import files
from owl_det.errors import UserError


@pytest.mark.parametrize(
    "address",
    ["gs://bucket/x", "s3://bucket/x", "https://example.com/a.jpg", "gs:/bucket/x", "hdfs:///x"],
)
def test_an_address_is_refused_and_named(address: str) -> None:
    with pytest.raises(UserError, match=f"^--out: {address} is an address"):
        files.local(address, "--out")
    with pytest.raises(UserError, match=f"^{address} is an address"):
        files.local(Path(address) if "//" not in address else address)


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
