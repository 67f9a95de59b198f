#!/usr/bin/env bash
# Installs the project, where that is not done yet, and trains a small detector on drawn images:
#   ./quickstart.sh [flags of owl_det.main, for example --config.num_steps=200]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_venv.sh
source scripts/setup_venv.sh

workdir=runs/quickstart
for argument in "$@"; do
  case "$argument" in
    --workdir=*) workdir="${argument#--workdir=}" ;;
    --workdir) fail "write --workdir=PATH, in one word" ;;
  esac
done

setup_venv
# XLA allocates a step's memory anew each time; huge pages make that a third faster on a CPU (glibc).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
"$OWL_DET_VENV_PYTHON" -m owl_det.main \
  --config=configs/quickstart.py --workdir="$workdir" "$@"

printf '\n'
printf '%s\n' "Summary:   $workdir/eval/summary.json" "Pictures:  $workdir/pictures" \
  "Curves:    ${OWL_DET_VENV_PYTHON%/python}/tensorboard --logdir $workdir"
