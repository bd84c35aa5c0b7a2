#!/usr/bin/env bash
# The demo, from nothing to a report: sets up, makes the data, trains, evaluates. Asks nothing; safe to start again.
#
#   bash launch/demo.sh                     under half an hour on two CPU cores; GPUs are used if there are
#   bash launch/demo.sh --quick             a few steps of every part, to see that it runs
#   bash launch/demo.sh --seed 1 --out DIR --no-cot-lr 3e-4
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
setup
exec python launch/demo.py --setup-seconds "$SECONDS" "$@"
