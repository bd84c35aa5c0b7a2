#!/usr/bin/env bash
# The demo, from nothing to a report: sets up, makes the data, trains, evaluates. Asks nothing; safe to start again.
#
#   bash launch/demo.sh [--quick] [--seed 0] [--out DIR] [--no-cot-lr 1e-3]      (python launch/demo.py --help)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
.venv/bin/python launch/build_ops.py
exec .venv/bin/python launch/demo.py --setup-seconds "$SECONDS" "$@"
