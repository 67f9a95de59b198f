#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice, with gcloud:
#   launch/tpu_pod.sh --tpu NAME --zone ZONE [--project PROJECT] --install
#   launch/tpu_pod.sh --tpu NAME --zone ZONE [--project PROJECT] -- \
#     .venv/bin/python -m owl_det.main --config=configs/x.py --workdir=/mnt/shared/RUN
# --install copies the committed files of this checkout to ~/owl_det on every host and installs them
# with the `tpu` extra. On a slice, `jax.distributed.initialize()` finds the other hosts by itself;
# OWL_DET_DISTRIBUTED=auto asks owl_det.main for that. --dry-run prints the commands, runs nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  printf '%s\n' "tpu_pod.sh: $*" >&2
  exit 2
}

tpu="" zone="" project="" install=false dry_run=false
while [[ $# -gt 0 ]]; do
  case "$1" in
    --tpu | --zone | --project)
      [[ $# -gt 1 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --tpu=* | --zone=* | --project=*)
      flag="${1%%=*}"
      printf -v "${flag#--}" '%s' "${1#*=}"
      shift
      ;;
    --install)
      install=true
      shift
      ;;
    --dry-run | --dry_run)
      dry_run=true
      shift
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown flag $1; the command to run goes after --" ;;
  esac
done
[[ -n "$tpu" && -n "$zone" ]] || fail "--tpu NAME and --zone ZONE are required"
$install || [[ $# -gt 0 ]] || fail "nothing to do: give --install, or a command after --"

where=("--zone=$zone" ${project:+"--project=$project"} --worker=all)

run() {
  if $dry_run; then
    printf '%s\n' "${*@Q}"
  else
    "$@"
  fi
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command="$1"
}

if $install; then
  archive="$(mktemp -d)/owl_det.tar.gz"
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:owl_det.tar.gz" "${where[@]}"
  on_all_hosts "mkdir -p owl_det && tar -xzf owl_det.tar.gz -C owl_det && cd owl_det && \
source scripts/setup_venv.sh && OWL_DET_EXTRAS=tpu setup_venv"
fi
if [[ $# -gt 0 ]]; then
  # The user's words are quoted once for the shell on the hosts.
  on_all_hosts "cd owl_det && OWL_DET_DISTRIBUTED=auto exec ${*@Q}"
fi
