#!/usr/bin/env bash
#SBATCH --job-name=owl_det
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# One process per node, which drives all accelerators of that node:
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh \
#     python -m owl_det.main --config=configs/x.py --workdir=W
# SIGTERM comes 180 s before the time limit; a requeued job resumes from the same workdir.
#   launch/slurm.sh --dry-run COMMAND...   prints what would run (outside a job: one process here)
set -euo pipefail

fail() {
  printf '%s\n' "slurm.sh: $*" >&2
  exit 2
}

dry_run=false
case "${1:-}" in
  --dry-run | --dry_run)
    dry_run=true
    shift
    ;;
  --) shift ;;
  -*) fail "unknown flag $1; flags of Slurm go before the script: sbatch [flags] launch/slurm.sh COMMAND..." ;;
esac
[[ $# -gt 0 ]] || fail "no command: sbatch [flags] launch/slurm.sh python -m owl_det.main ..."

if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  coordinator="${hosts%%$'\n'*}"
  num_processes="$SLURM_NTASKS"
  # Jobs that share a node get different ports.
  port=$((20000 + SLURM_JOB_ID % 10000))
elif $dry_run; then
  coordinator=127.0.0.1 num_processes=1 port=20000
else
  fail "not inside a Slurm job: submit it with sbatch, or look at it with --dry-run"
fi

export OWL_DET_COORDINATOR_ADDRESS="$coordinator:$port"
export OWL_DET_NUM_PROCESSES="$num_processes"
# Without this srun gives a task one core, whatever sbatch was asked for (Slurm 22.05 and later).
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
# The process id is known only within each task.
# shellcheck disable=SC2016
task='OWL_DET_PROCESS_ID=$SLURM_PROCID exec "$@"'
launch=(srun --kill-on-bad-exit=1 --label bash -c "$task" task "$@")

if $dry_run; then
  printf '%s ' "OWL_DET_COORDINATOR_ADDRESS=$OWL_DET_COORDINATOR_ADDRESS" \
    "OWL_DET_NUM_PROCESSES=$OWL_DET_NUM_PROCESSES"
  printf '%s\n' "${launch[*]@Q}"
else
  exec "${launch[@]}"
fi
