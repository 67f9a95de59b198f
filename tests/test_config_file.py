"""Config files that are missing, wrong or a run's own, and changes from the command line."""

import json
from pathlib import Path

import pytest

from owl_det import config as config_lib
from owl_det import main
from owl_det.cli import options
from owl_det.config import config_file
from owl_det.errors import ConfigError, ExitCode
from tests import tiny

START = "from owl_det import presets\n\ndef get_config():\n    config = presets.base()\n"


@pytest.fixture
def run_json(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(config_lib.to_json(tiny.config()) + "\n")
    return str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (START + "    foo.bar = 1\n", r"mine.py, line 5: NameError: name 'foo' is not defined"),
        (START + "    return config +\n", r"mine.py, line 5: SyntaxError: invalid syntax"),
        ("import nothing_of_this_name\n", r"line 1: ModuleNotFoundError: No module named 'nothing"),
        (START + "    config.batchsize = 3\n", r"line 5: .*'batchsize'; did you mean 'batch_size'"),
        (START + "    config.batch_size = 'x'\n", r"line 5: TypeError"),
        (START + "    presets.add_source(config.data.train, 'a', 3)\n", r"line 5: TypeError"),
        (START + "    return 3\n", r"mine.py: get_config\(\) returns int, not"),
        (START, r"mine.py: get_config\(\) returns NoneType"),
        ("config = {}\n", r"mine.py: defines no function get_config"),
        ("def get_config():\n    return {'modle': 1}\n", r"mine.py: config.modle: no such key"),
        ("def get_config():\n    return {1: 2}\n", r"mine.py: config.1: no such key"),
        ("raise SystemError\n", r"mine.py, line 1: SystemError$"),
    ],
)
def test_an_error_in_a_config_file_names_file_line_and_error(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config_file.read(str(file))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seed": 1,\n}', "config.json, line 2: no JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"seed": "1"}', "config.seed: expected int, got str"),
        ("\xff", "no JSON"),
        ('{"seed": ' + "1" * 5000 + "}", "no JSON"),
        ('{"seed": ' + "1" * 100 + "}", "config.seed: must be at most"),
        ('{"optimizer": {"learning_rate": NaN}}', "learning_rate: expected a finite number"),
        ('{"data": {"train": {"a/b": {"kind": "coco"}}}}', "'a/b' is no name"),
        ('{"data": {"train": {"a": {"kind": ["coco"]}}}}', "config.data.train.a.kind"),
        ('{"data": {"path": "a\\u0000b"}}', "config.data.path: .* characters that no"),
        ('{"data": {"path": "\\ud800"}}', "config.data.path: .* characters that no"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_json_config_that_is_wrong_is_one_error(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        config_file.read(str(file))


def test_a_runs_own_json_is_a_config_and_takes_changes(run_json: str) -> None:
    assert config_file.read(run_json) == tiny.config()
    changes = ["--config.num-steps=7", "--config.data.train.shapes.num_images", "9"]
    changes += ["--config.data.augment.mosaic_sizes=(1, 2)", "--config.data.augment.flip"]
    changes += [
        "--config.data.augment.mosaic_probabilities=(0.5,0.5)",
        "--config.model.image.width=64",
    ]
    made = config_file.read(run_json, changes)
    assert (made.num_steps, made.model.image.width) == (7, 64)
    assert made.data.augment.mosaic_sizes == (1, 2) and made.data.augment.flip
    assert getattr(made.data.train["shapes"], "num_images", 0) == 9
    assert not config_file.read(run_json, ["--noconfig.data.augment.flip"]).data.augment.flip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.batchsize=4", r"no such key; did you mean --config.batch_size\?"),
        ("--config.batch-sise=4", r"no such key; did you mean --config.batch_size\?"),
        ("--config.data.train.shape.path=x", r"did you mean --config.data.train.shapes\?"),
        ("--config.data.train.shapes.spilt=test", r"did you mean --config.data.train.shapes.split"),
        ("--config.data.eval.val.path=x", "config.data.eval is empty"),
        ("--config.seed.x=1", "config.seed is one value"),
        ("--config.batch_size=many", "config.batch_size=many"),
        ("--config.batch_size=1e3", "config.batch_size=1e3"),
        ("--config.optimizer.learning_rate=nan", "expected a finite number"),
        ("--config.batch_size=0", "config.batch_size: must be positive"),
        ("--config.data.path=gs://bucket/x", "config.data.path: gs://bucket/x is an address"),
        ("--config.checkpoint.init_from=s3:/b/x", "config.checkpoint.init_from: .* is an address"),
        ("--config.distill.teacher=https://a/b", "config.distill.teacher: .* is an address"),
    ],
)
def test_a_change_that_is_wrong_is_one_short_line(change: str, message: str, run_json: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config_file.read(run_json, [change])
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_home_is_found_in_paths_of_a_config(run_json: str) -> None:
    made = config_file.read(run_json, ["--config.data.path=~/data"])
    assert made.data.path == str(Path.home() / "data")


@pytest.mark.parametrize("name", ["quickstart", "configs.quickstart", "configs/quickstart.py"])
def test_shipped_configs_are_found_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file.read(name).name == "quickstart"


def test_configs_of_an_installed_package_lie_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "_PACKAGE", tmp_path / "owl_det")
    monkeypatch.chdir(tmp_path)
    _write_config(tmp_path / "owl_det" / "configs" / "shipped.py", "inside")
    _write_config(tmp_path / "configs" / "other.py", "beside")
    for name in ("shipped", "configs.shipped", "configs/shipped.py"):
        assert config_file.read(name).name == "inside"
    with pytest.raises(ConfigError, match="other: no such file; shipped configs: shipped$"):
        config_file.read("other")
    assert config_file.read("configs/other.py").name == "beside"


def test_a_users_own_folder_of_configs_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    for name in ("__init__", "base", "quickstart"):
        _write_config(tmp_path / "configs" / f"{name}.py", "mine")
    assert config_file.read("configs/quickstart.py").name == "mine"
    assert config_file.read("quickstart").name == "quickstart"
    assert config_file.read("configs/bccd.py").name == "bccd"


def _write_config(file: Path, name: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = {"name": name, "data": {"train": {"shapes": {"kind": "shapes_world"}}}}
    file.write_text(f"{START}    return {tree!r}\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/quikstart.py", "quikstart.py: no such file; did you mean quickstart?"),
        ("configs/zzz.py", "configs/zzz.py: no such file; shipped configs: .*quickstart"),
        ("gs://bucket/x.py", "--config: gs://bucket/x.py is an address"),
    ],
)
def test_a_missing_config_file_is_called_that(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([f"--config={name}", "--workdir=w"]) == ExitCode.REFUSED
    shown = capsys.readouterr().err
    assert shown.startswith("owl_det: ") and shown.count("\n") == 1
    with pytest.raises(Exception, match=message):
        raise ConfigError(shown)


def test_a_folder_as_config_points_to_the_json_inside(run_json: str) -> None:
    with pytest.raises(ConfigError, match="is a folder, not a file; did you mean .*config.json"):
        config_file.read(str(Path(run_json).parent))


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull", "--version"])
def test_help_and_version_end_well(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([flag])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert ("--config.KEY=VALUE" in shown) != (flag == "--version")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=quickstart", "--workdir="], "--workdir: is empty"),
        (["--config=quickstart", "--workdir=gs://b/run"], "--workdir: gs://b/run is an address"),
        (["--config=quickstart", "--workdir=w", "--dry-rum"], "unknown argument '--dry_rum'"),
    ],
)
def test_arguments_that_are_wrong_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(arguments) == ExitCode.REFUSED
    shown = capsys.readouterr().err
    assert shown.startswith(f"owl_det: {message}") and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_both_spellings_of_an_option_are_one(run_json: str) -> None:
    parser = main._parser()
    tree = json.loads(Path(run_json).read_text())
    assert tree["num_steps"] == 10
    given = options.with_underscores(["--dry-run", "--dry-run-devices=8", "--config.num-steps=3"])
    known, changes = parser.parse_known_args(["--config", run_json, "--workdir=w", *given])
    assert known.dry_run and known.dry_run_devices == 8 and changes == ["--config.num-steps=3"]
    assert not parser.parse_args(
        ["--config=c", "--workdir=w", "--nodry_run_compile"]
    ).dry_run_compile
