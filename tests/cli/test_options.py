import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from owl_det import cli
from owl_det.cli import command as command_line
from owl_det.cli import options
from owl_det.errors import ExitCode

COMMANDS = (
    *("predict", "embed", "search", "evaluate", "evaluate-regions", "sample", "convert", "models"),
    *("annotate", "annotate-precision", "ensemble", "cache-teacher", "export"),
)


def test_dashes_and_underscores_are_one() -> None:
    given = ["predict", "--query-image=a-b.png", "--top_k", "--nms-iou", "-", "--", "--a-b"]
    expected = ["predict", "--query_image=a-b.png", "--top_k", "--nms_iou", "-", "--", "--a-b"]
    assert options.with_underscores(given) == expected


def test_a_flag_is_written_out() -> None:
    parser = options.Parser(prog="tool")
    parser.add_argument("--threshold")
    with pytest.raises(SystemExit):
        parser.parse_args(["--thres", "1"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["predict", "a", "--checkpoint=b", "--qeury=c"], "--qeury=c; did you mean --query?; see"),
        (["predict", "a.png", "--checkpoint", "a", "--zzz"], "--zzz; see owl-det predict --help"),
        (["visualize", "features", "a", "--outt", "b"], "see owl-det visualize features --help"),
    ],
)
def test_an_unknown_flag_is_named_with_the_command_and_the_flag_that_was_meant(
    given: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _code(given) == ExitCode.REFUSED
    shown = capsys.readouterr().err
    assert line in shown and shown.count("\n") == 1


def _code(given: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(given)
    return ended.value.code


def test_help_names_defaults_once() -> None:
    parser = options.Parser(prog="tool")
    parser.add_argument("--size", type=int, default=8, help="of a batch")
    parser.add_argument("--side", type=int, default=0, help="default: the model's")
    parser.add_argument("--list", action="append", default=[], help="repeat")
    shown = parser.format_help()
    assert "of a batch (default: 8)" in shown
    assert shown.count("default") == 2


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage: owl-det" in capsys.readouterr().out
    parser = _subparsers(command_line.parser())[command]
    silent = [action.dest for action in parser._actions if not (action.help or "").strip()]
    assert silent == []


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import owl_det.main", ["options"]),
        ("from owl_det import cli; cli.main(['models'])", ["command", "convert", "options"]),
    ],
)
def test_a_command_loads_no_other_command(code: str, modules: list[str]) -> None:
    loaded = "[name for name in sys.modules if name.startswith('owl_det.cli.')]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(sorted({loaded}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str([f"owl_det.cli.{name}" for name in modules])


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "gs://b/a.png", "--checkpoint=x", "--query=a"],
        ["predict", "a.png", "--checkpoint=gs://b/x", "--query=a"],
        ["predict", "a.png", "--checkpoint=x", "--query=a", "--out=s3://b/x"],
        ["predict", "a.png", "--checkpoint=x", "--query_image=https://b/a.png:1,2,3,4"],
        ["embed", "a.png", "--checkpoint=x", "--out=gs://b/x"],
        ["search", "gs://b/x", "--checkpoint=x", "--query=a"],
        ["evaluate", "--checkpoint=x", "--dataset=coco", "--annotations=gs://a", "--images=x"],
        ["evaluate", "--checkpoint=x", "--dataset=coco", "--annotations=a", "--images=gs://x"],
        ["evaluate", "--checkpoint=x", "--dataset=shapes_world", "--out=gs://b/m.json"],
        ["evaluate", "--checkpoint=x", "--dataset=shapes_world", "--results=gs://b/m.json"],
        ["evaluate-regions", "--checkpoint=x", "--dataset=shapes_world", "--out=gs://b/m.json"],
        ["sample", "--out=gs://b/x"],
        ["convert", "s3://b/x", "new", "--from=scenic"],
        ["convert", "x", "s3://b/new", "--from=scenic"],
        ["export", "gs://b/x", "new"],
        ["export", "x", "gs://b/new"],
        ["annotate", "--checkpoint=x", "--input=gs://b/x", "--output=new"],
        ["annotate", "--checkpoint=x", "--input=x", "--output=gs://b/new"],
        ["annotate", "--checkpoint=x", "--input=x", "--output=new", "--vocabulary=gs://b/names"],
        ["annotate", "--checkpoint=x", "--input=x", "--output=new", "--labels=gs://b/names"],
        ["annotate-precision", "gs://b/x"],
        ["annotate-precision", "x", "--source=kind=coco,path=gs://b,annotations=a,images=b"],
        ["ensemble", "--self_trained=gs://x", "--fine_tuned=x", "--weight=0.5"],
        ["ensemble", "--self-trained=x", "--fine-tuned=x", "--weight=0.5", "--out=gs://x"],
        ["cache-teacher", "--config=gs://b/c.py", "--out=new"],
        ["cache-teacher", "--config=configs/clipself_shapes.py", "--out=gs://b/new"],
        ["visualize", "features", "gs://b/a.png", "--checkpoint=x", "--out=new"],
        ["visualize", "features", "a.png", "--checkpoint=x", "--out=gs://b/new"],
    ],
    ids=" ".join,
)
def test_addresses_are_refused_by_every_command(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == ExitCode.REFUSED
    shown = capsys.readouterr().err
    assert "is an address" in shown and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
