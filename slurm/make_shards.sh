#!/usr/bin/env bash
#SBATCH --job-name=make-shards
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
#
# Makes a set of shards on several nodes, one array element a part; the last to end puts the set together.
#
#   sbatch slurm/make_shards.sh data.jsonl --out shards/train --image-root images
#   sbatch --array=1-32 --cpus-per-task=16 slurm/make_shards.sh data.jsonl --out shards/train --shard-size 256
#
# The words are those of launch/make_shards.py. Killed or requeued elements go on; the same bytes come of any array.
set -eEuo pipefail
ROOT=${COCONUT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib.sh" ] || {
  echo "error: $ROOT is not the project's folder; submit from there, or set COCONUT_ROOT" >&2
  exit 2
}
cd "$ROOT"
. slurm/lib.sh

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this makes one part of a set: start it with sbatch [--array=1-N]" 2
if [ "${SLURM_ARRAY_TASK_MIN:-1}" != 1 ] || [ "$SLURM_ARRAY_TASK_MAX" != "$SLURM_ARRAY_TASK_COUNT" ]; then
  fail "the array has to count from 1 in steps of 1: submit with --array=1-N" 2
fi
case " $* " in
  *' --part'* | *' --force '*) fail "--part and --force do not go with an array" 2 ;;
esac
read_settings
say "part $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_TASK_COUNT, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
on_one "$COCONUT_PYTHON" launch/make_shards.py "$@" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
exit 0
