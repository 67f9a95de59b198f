# shellcheck shell=bash
# Sourced by quickstart.sh, run_tests.sh and .ci/run: makes the virtual environment, once.
#
#   OWL_DET_VENV    where it lies (default: .venv beside pyproject.toml)
#   OWL_DET_PYTHON  the interpreter that makes it (default: python3.11, else python3.12, else python3)
#   OWL_DET_EXTRAS  extras of the package, for example cuda or tpu (default: none beyond the lock)
#
# setup_venv sets OWL_DET_VENV_PYTHON, the interpreter to run the commands with.

OWL_DET_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  printf '%s\n' "error: $*" >&2
  exit 2
}

# A command may exist and not run (a version manager's shim), so each candidate is asked.
runs_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
    </dev/null >/dev/null 2>&1
}

# Every interpreter that may be there, one a line: a version manager's too, whose shims do not run
# where no version is selected.
python_candidates() {
  local version
  printf '%s\n' python3.11 python3.12 python3 python
  if command -v pyenv >/dev/null; then
    pyenv versions --bare 2>/dev/null | while read -r version; do
      printf '%s\n' "$(pyenv root)/versions/$version/bin/python"
    done
  fi
}

find_python() {
  local candidate
  if [[ -n "${OWL_DET_PYTHON:-}" ]]; then
    runs_supported_python "$OWL_DET_PYTHON" ||
      fail "OWL_DET_PYTHON=$OWL_DET_PYTHON does not run, or is not Python 3.11 or 3.12"
    printf '%s\n' "$OWL_DET_PYTHON"
    return
  fi
  while read -r candidate; do
    if runs_supported_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done < <(python_candidates)
  fail "no Python 3.11 or 3.12 found: install one, or name it in OWL_DET_PYTHON"
}

# The first interpreter of this version, such as 3.12; fails where there is none.
find_version() {
  local candidate
  while read -r candidate; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
      </dev/null >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done < <(python_candidates)
  return 1
}

# The locks hold for the platform they were made on; elsewhere pip resolves pyproject.toml.
lock_path() {
  local tag
  if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
    return
  fi
  tag="$("$1" -c 'import sys; print("py%d%d" % sys.version_info[:2])')"
  printf '%s\n' "$OWL_DET_ROOT/requirements/$tag.lock"
}

setup_venv() {
  local venv lock extras stamp wanted python
  local -a arguments
  venv="${OWL_DET_VENV:-$OWL_DET_ROOT/.venv}"
  OWL_DET_VENV_PYTHON="$venv/bin/python"
  if [[ ! -x "$OWL_DET_VENV_PYTHON" ]]; then
    python="$(find_python)" || exit
    "$python" -m venv "$venv" ||
      fail "$python -m venv $venv failed (on Debian and Ubuntu: apt install python3-venv)"
  fi
  runs_supported_python "$OWL_DET_VENV_PYTHON" ||
    fail "$venv is not an environment of Python 3.11 or 3.12: remove it, or set OWL_DET_VENV"

  extras="${OWL_DET_EXTRAS:-}"
  lock="$(lock_path "$OWL_DET_VENV_PYTHON")" || exit
  arguments=()
  if [[ -n "$lock" ]]; then
    arguments+=(-r "$lock")
  else
    extras="test,dev${extras:+,$extras}"
  fi
  arguments+=(-e "$OWL_DET_ROOT${extras:+[$extras]}")

  # Written last: an installation that was interrupted is taken up again.
  stamp="$venv/.owl_det_installed"
  wanted="${arguments[*]} $(cat "$OWL_DET_ROOT/pyproject.toml" ${lock:+"$lock"} | cksum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  printf '%s\n' "Installing into $venv (a few minutes, 3 GB)" >&2
  "$OWL_DET_VENV_PYTHON" -m pip install -qq --disable-pip-version-check \
    "${arguments[@]}" </dev/null ||
    fail "the installation into $venv failed; its messages are above"
  printf '%s\n' "$wanted" >"$stamp"
}
