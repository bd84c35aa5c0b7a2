#!/usr/bin/env bash
# Sets up and runs every check of the project. Needs nothing but python3 (or uv).
#
#   bash launch/test.sh            everything, long tests shortened
#   bash launch/test.sh --full     everything at full length
#
# With CI=true, what this machine lacks (SLURM, chromium, shellcheck) is a failure; otherwise its tests are skipped, saying so.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

case ${1:-} in
  '') ;;
  --full) export COCONUT_FULL_TESTS=1 ;;
  *) fail "usage: bash launch/test.sh [--full]" ;;
esac

export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

setup dev

section "System packages of the tests"
missing=()
command -v shellcheck >/dev/null || missing+=(shellcheck)
command -v chromium >/dev/null || missing+=(chromium)
PATH=$PATH:/usr/sbin:/sbin
for command in slurmctld slurmd sbatch munged; do
  command -v "$command" >/dev/null || {
    missing+=(slurmctld slurmd slurm-client munge)
    break
  }
done
if [ ${#missing[@]} = 0 ]; then
  say "all there"
elif ! apt_install "${missing[@]}"; then
  [ "${CI:-}" != true ] || fail "CI=true, and ${missing[*]} cannot be installed"
fi

section "ruff"
ruff check .
ruff format --check .

section "mypy"
mypy

section "Layers"
lint-imports --no-logo

section "shellcheck"
mapfile -t scripts < <(find launch slurm .ci -type f \( -name '*.sh' -o -path '.ci/run' \) 2>/dev/null | sort)
if command -v shellcheck >/dev/null; then
  shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
  say "${#scripts[@]} scripts are clean"
else
  say "skipped: shellcheck is not here"
fi

section "Tests: unit, then distributed, long, end to end, SLURM"
exec python -m pytest
