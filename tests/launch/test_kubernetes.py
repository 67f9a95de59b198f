"""The Kubernetes launcher: its manifest against a schema, and what the processes get."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "kubernetes.py"
SCHEMA = Path(__file__).with_name("jobset.schema.json")
COMMAND = ("python", "-m", "owl_det.main", "--config=c.py", "--workdir=/mnt/shared/a b")
GPUS = ("--name", "run", "--image", "i:1", "--num_hosts", "4", "--gpus_per_host", "8")
TPUS = (
    *("--name", "run", "--image", "i:1", "--num_hosts", "8"),
    *("--tpu_accelerator", "tpu-v5-lite-podslice", "--tpu_topology", "4x8"),
)


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def manifest(*arguments: str) -> Any:
    done = launch(*arguments, "--dry_run", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod_of(found: Any) -> Any:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def variables(found: Any) -> dict[str, Any]:
    return {entry["name"]: entry for entry in pod_of(found)["containers"][0]["env"]}


@pytest.mark.parametrize("arguments", [GPUS, (*GPUS, "--claim", "shared"), TPUS])
def test_manifest_fits_the_schema(arguments: tuple[str, ...]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with requirements/parity.txt")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    found = manifest(*arguments)
    jsonschema.validate(found, schema)
    pod_of(found)["containers"][0]["comand"] = ["a misspelt field"]
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.validate(found, schema)


def test_processes_on_gpus_find_the_first_pod() -> None:
    found = manifest(*GPUS)
    env = variables(found)
    job = found["spec"]["replicatedJobs"][0]
    # SET-JOB-INDEX-POD.SUBDOMAIN, where the subdomain is the set's name unless it is given.
    name = f"{found['metadata']['name']}-{job['name']}-0-0.{found['metadata']['name']}"
    host, port = env["OWL_DET_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == name
    assert pod_of(found)["containers"][0]["ports"] == [{"containerPort": int(port)}]
    assert found["spec"]["network"]["enableDNSHostnames"] is True
    assert env["OWL_DET_NUM_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in str(env["OWL_DET_PROCESS_ID"]["valueFrom"])
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == 4
    assert pod_of(found)["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_processes_on_a_tpu_slice_find_each_other() -> None:
    found = manifest(*TPUS)
    assert variables(found)["OWL_DET_DISTRIBUTED"]["value"] == "auto"
    assert "OWL_DET_COORDINATOR_ADDRESS" not in variables(found)
    assert pod_of(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod_of(found)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"


def test_the_command_is_passed_on_unchanged() -> None:
    assert pod_of(manifest(*GPUS))["containers"][0]["command"] == list(COMMAND)


def test_a_claim_is_mounted_where_it_is_asked_for() -> None:
    pod = pod_of(manifest(*GPUS, "--claim", "disk", "--mount", "/data"))
    claims = [v for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims[0]["persistentVolumeClaim"] == {"claimName": "disk"}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts[claims[0]["name"]] == "/data"


def test_kubectl_gets_what_the_dry_run_prints(tmp_path: Path) -> None:
    stand_in = tmp_path / "kubectl"
    stand_in.write_text('#!/usr/bin/env bash\necho "# kubectl $*"\ncat\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    applied = launch(*GPUS, "--", *COMMAND, PATH=path)
    assert applied.returncode == 0, applied.stderr
    assert applied.stdout == launch(*GPUS, "--dry_run", "--", *COMMAND).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GPUS, "no command"),
        (("--name", "Run", *GPUS[2:], "--", "python"), "--name: at most 40"),
        ((*GPUS[:6], "--", "python"), "give --gpus_per_host"),
        ((*GPUS, *TPUS[6:], "--", "python"), "give --gpus_per_host"),
        ((*TPUS[:8], "--", "python"), "give --gpus_per_host"),
        ((*TPUS[:-1], "4x5", "--", "python"), "no product that 8 hosts share"),
        ((*TPUS[:-1], "4by8", "--", "python"), "no product that 8 hosts share"),
    ],
)
def test_bad_calls_say_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_flags_are_spelt_with_either_sign() -> None:
    assert manifest(*GPUS) == manifest(*(word.replace("_", "-") for word in GPUS))
    done = launch(*GPUS, "--no-such-flag", "--", *COMMAND)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kubernetes.py: ")
