"""Dry runs of the shell launchers."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OWL_DET_"))}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def program(folder: Path, name: str, body: str) -> None:
    """Puts an executable stand-in on the path that a test gives."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def slurm_job(folder: Path) -> dict[str, str]:
    program(folder, "scontrol", '[[ "$*" == "show hostnames n[3-4]" ]] && printf "n3\\nn4\\n"')
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "10042",
        "SLURM_JOB_NODELIST": "n[3-4]",
        "SLURM_NTASKS": "2",
    }


def test_slurm_dry_run_in_a_job(tmp_path: Path):
    done = run("slurm.sh", "--dry-run", "python", "a b", **slurm_job(tmp_path))
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["OWL_DET_COORDINATOR_ADDRESS=n3:20042", "OWL_DET_NUM_PROCESSES=2"]
    assert words[2] == "srun"
    assert words[-2:] == ["python", "a b"]


def test_slurm_tasks_get_the_three_variables(tmp_path: Path):
    # Stands for srun: drops its flags and runs the task twice, as two nodes would.
    program(
        tmp_path,
        "srun",
        'while [[ "$1" == -* ]]; do shift; done; for i in 0 1; do SLURM_PROCID=$i "$@"; done',
    )
    names = "$OWL_DET_COORDINATOR_ADDRESS $OWL_DET_NUM_PROCESSES $OWL_DET_PROCESS_ID $1"
    done = run("slurm.sh", "bash", "-c", f'echo "{names}"', "_", "a b", **slurm_job(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["n3:20042 2 0 a b", "n3:20042 2 1 a b"]


def test_slurm_dry_run_outside_a_job():
    done = run("slurm.sh", "--dry-run", "python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OWL_DET_COORDINATOR_ADDRESS=127.0.0.1:20000")


def test_tpu_dry_run(tmp_path: Path):
    done = run(
        "tpu_pod.sh",
        *("--tpu", "slice", "--zone", "z", "--project", "p", "--install", "--dry-run"),
        *("--", "python", "-m", "owl_det.main", "--name=a b"),
    )
    assert done.returncode == 0, done.stderr
    archive, copy, install, command = map(shlex.split, done.stdout.splitlines())
    assert archive[0] == "git"
    assert archive[-1] == "HEAD"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert install[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert {"--zone=z", "--project=p", "--worker=all"} <= set(command)
    remote = command[-1].removeprefix("--command=")
    assert "OWL_DET_DISTRIBUTED=auto" in remote
    assert shlex.split(remote)[-4:] == ["python", "-m", "owl_det.main", "--name=a b"]


def test_tpu_command_reaches_the_host_unchanged(tmp_path: Path):
    (tmp_path / "owl_det").mkdir()
    # Stands for gcloud: a host's shell that runs what `ssh --command=` gives.
    program(tmp_path, "gcloud", f'cd {tmp_path}; last="${{@: -1}}"; bash -c "${{last#--command=}}"')
    done = run(
        "tpu_pod.sh",
        *("--tpu", "slice", "--zone", "z", "--", "bash", "-c"),
        'echo "$OWL_DET_DISTRIBUTED $1"',
        *("_", "it's a b"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.stdout.splitlines() == ["auto it's a b"], done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("slurm.sh", (), "no command"),
        ("slurm.sh", ("python",), "not inside a Slurm job"),
        ("slurm.sh", ("--nodes=2", "python"), "unknown flag --nodes=2"),
        ("tpu_pod.sh", ("--", "python"), "--tpu NAME and --zone ZONE are required"),
        ("tpu_pod.sh", ("--tpu",), "--tpu needs a value"),
        ("tpu_pod.sh", ("--tpu", "t", "--zone", "z"), "nothing to do"),
        ("tpu_pod.sh", ("--nodes", "2"), "unknown flag --nodes"),
    ],
)
def test_bad_calls_say_what_is_wrong(name: str, arguments: tuple[str, ...], message: str):
    done = run(name, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_values_of_tpu_flags_may_follow_an_equals_sign() -> None:
    apart = run("tpu_pod.sh", "--tpu", "t", "--zone", "z", "--dry-run", "--", "python", "a b")
    joined = run("tpu_pod.sh", "--tpu=t", "--zone=z", "--dry_run", "--", "python", "a b")
    assert apart.returncode == joined.returncode == 0, joined.stderr
    assert apart.stdout == joined.stdout and "a b" in joined.stdout
