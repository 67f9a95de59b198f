#!/usr/bin/env bash
# Installs the project, where that is not done yet, and runs its tests: ./run_tests.sh [pytest flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_venv.sh
source scripts/setup_venv.sh

setup_venv
exec "$OWL_DET_VENV_PYTHON" -m pytest "$@"
