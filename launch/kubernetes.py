"""Runs one command on several hosts of a Kubernetes cluster, as a JobSet (jobset.sigs.k8s.io).

    python launch/kubernetes.py --name l14 --image REGISTRY/owl_det:TAG --num_hosts 4 \
        --gpus_per_host 8 --claim shared -- \
        python -m owl_det.main --config=configs/owlv2_l14.py --workdir=/mnt/shared/l14

One pod a host, one process a pod. On GPUs every process gets OWL_DET_COORDINATOR_ADDRESS (pod 0),
OWL_DET_NUM_PROCESSES and OWL_DET_PROCESS_ID; on a TPU slice (--tpu_accelerator, --tpu_topology)
OWL_DET_DISTRIBUTED=auto, because there JAX finds the other hosts by itself. When a pod fails the
whole set starts again, at most --max_restarts times, and goes on from its workdir. --dry_run prints
the manifest and applies nothing.
"""

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import command_line
import yaml

_JOB = "workers"
_PORT = 20000
# SIGTERM comes so long before SIGKILL: time to finish a step and save.
_GRACE_SECONDS = 180
# Pods are called NAME-workers-0-NUMBER; a host name has at most 63 characters.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


def main(argv: Sequence[str]) -> int:
    options, command = parse(argv)
    text = yaml.safe_dump(manifest(options, command), sort_keys=False)
    apply = ["kubectl", "apply", "--filename=-"]
    if options.dry_run:
        print(f"# {' '.join(apply)}")
        print(text, end="")
        return 0
    try:
        return subprocess.run(apply, input=text, text=True).returncode
    except OSError as error:
        print(f"kubernetes.py: kubectl does not start: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the launcher's own flags from the command that follows `--`."""
    own, command = command_line.split(argv)
    parser = command_line.Parser(
        prog="kubernetes.py",
        usage="kubernetes.py --name NAME --image IMAGE --num_hosts N [flags] -- command …",
        description=__doc__,
    )
    parser.add_argument("--name", required=True, help="of the JobSet: a-z, 0-9, -")
    parser.add_argument("--image", required=True, help="container with owl_det installed")
    parser.add_argument("--num_hosts", type=command_line.positive, required=True)
    parser.add_argument(
        "--gpus_per_host", type=command_line.positive, help="NVIDIA GPUs of each pod"
    )
    parser.add_argument("--tpu_accelerator", help="GKE's name, as tpu-v5-lite-podslice")
    parser.add_argument("--tpu_topology", help="chips of the slice, as 4x8")
    parser.add_argument("--namespace", default="default", help="of the cluster (%(default)s)")
    parser.add_argument("--claim", help="PersistentVolumeClaim that every pod mounts")
    parser.add_argument(
        "--mount", default="/mnt/shared", help="where the claim is mounted (%(default)s)"
    )
    parser.add_argument(
        "--max_restarts", type=int, default=10, help="of the whole set (%(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the manifest, apply nothing")
    options = parser.parse_args(own)
    if not command:
        parser.error("no command: write it after `--`, as in `-- python -m owl_det.main …`")
    if not _NAME.fullmatch(options.name):
        parser.error(f"--name: at most 40 of a-z, 0-9 and -, a letter first, got {options.name!r}")
    tpu = (options.tpu_accelerator, options.tpu_topology)
    if any(tpu) == bool(options.gpus_per_host) or any(tpu) != all(tpu):
        parser.error("give --gpus_per_host, or both --tpu_accelerator and --tpu_topology")
    if options.tpu_topology and not _chips_per_host(options):
        parser.error(
            f"--tpu_topology: {options.tpu_topology!r} is no product that {options.num_hosts} "
            "hosts share evenly"
        )
    return options, command


def manifest(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet, as a mapping; field names are those of jobset.x-k8s.io/v1alpha2."""
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # one process alone cannot come back into a running set
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [_container(options, command)],
        "volumes": [
            # Collectives within a host go through shared memory; 64 MiB is the default.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            *([_claim(options.claim)] if options.claim else []),
        ],
    }
    if options.tpu_accelerator:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu_accelerator,
            "cloud.google.com/gke-tpu-topology": options.tpu_topology,
        }
    job = {
        "completionMode": "Indexed",
        "completions": options.num_hosts,
        "parallelism": options.num_hosts,
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "namespace": options.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.max_restarts},
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _container(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    if options.gpus_per_host:
        resources = {"nvidia.com/gpu": options.gpus_per_host}
    else:
        resources = {"google.com/tpu": _chips_per_host(options)}
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if options.claim:
        mounts.append({"name": "claim", "mountPath": options.mount})
    return {
        "name": "owl-det",
        "image": options.image,
        "command": list(command),
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, *_environment(options)],
        "ports": [{"containerPort": _PORT}],
        "resources": {"requests": dict(resources), "limits": resources},
        "volumeMounts": mounts,
    }


def _environment(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.tpu_accelerator:
        return [{"name": "OWL_DET_DISTRIBUTED", "value": "auto"}]
    # Host name of pod 0, in the headless service that carries the set's name.
    coordinator = f"{options.name}-{_JOB}-0-0.{options.name}:{_PORT}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "OWL_DET_COORDINATOR_ADDRESS", "value": coordinator},
        {"name": "OWL_DET_NUM_PROCESSES", "value": str(options.num_hosts)},
        {"name": "OWL_DET_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _claim(name: str) -> dict[str, Any]:
    return {"name": "claim", "persistentVolumeClaim": {"claimName": name}}


def _chips_per_host(options: argparse.Namespace) -> int:
    """Chips of the slice over hosts; 0 where the topology is none or does not divide."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", options.tpu_topology):
        return 0
    chips = math.prod(int(side) for side in options.tpu_topology.split("x"))
    return 0 if chips % options.num_hosts else chips // options.num_hosts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
