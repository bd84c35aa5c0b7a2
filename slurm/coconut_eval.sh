#!/usr/bin/env bash
#SBATCH --job-name=coconut-eval
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=slurm/logs/%x-%A_%a.out
#
# Evaluates the finished stages of runs, one array element a stage of a run; the last to end writes one report.
#
#   sbatch slurm/coconut_eval.sh runs/arrow_maze -- --data data/arrow_maze/shards/test --controls
#   sbatch --array=0-14 slurm/coconut_eval.sh --out runs/seeds runs/seed_0 runs/seed_1 runs/seed_2 -- --data SHARDS/test
#
# Elements count the stages of the first run, then those of the second, and so on; elements past the last one end with 0.
# What follows -- are the options of launch/evaluate.py, without --checkpoint and --out. Answers are in RUN/eval/stage_K,
# the report in OUT/report (default: the first run's folder). Given again, the same command goes on where it stopped.
set -eEuo pipefail
trap 'echo "error: line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND" >&2' ERR
ROOT=${COCONUT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib.sh" ] || {
  echo "error: $ROOT is not the project's folder; submit from there, or set COCONUT_ROOT" >&2
  exit 2
}
cd "$ROOT"
. slurm/lib.sh

main() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this is one evaluation of a job array: start it with sbatch [--array=0-N]" 2
  ARRAY=$SLURM_ARRAY_JOB_ID RESTARTS=${SLURM_RESTART_COUNT:-0}
  ELEMENT=${ARRAY}_$SLURM_ARRAY_TASK_ID STOPPING=''
  trap 'STOPPING=limit' USR1
  trap 'STOPPING=cancelled' TERM
  read_settings
  read_runs "$@"
  list_checkpoints
  local number=$SLURM_ARRAY_TASK_ID
  if [ "${SLURM_ARRAY_TASK_MIN:-0}" != 0 ] || [ "$SLURM_ARRAY_TASK_COUNT" -lt ${#CHECKPOINTS[@]} ]; then
    fail "${#CHECKPOINTS[@]} finished stages: submit with --array=0-$((${#CHECKPOINTS[@]} - 1))" 2
  fi
  if [ "$number" -ge ${#CHECKPOINTS[@]} ]; then
    say "nothing to do: there are ${#CHECKPOINTS[@]} finished stages"
    exit 0
  fi
  CHECKPOINT=${CHECKPOINTS[number]}
  RUN=${CHECKPOINT%/*}
  LOGS=$RUN/slurm/eval-$ELEMENT-restart-$RESTARTS
  mkdir -p "$LOGS"
  say "element $ELEMENT, restart $RESTARTS, on $SLURM_JOB_NODELIST: $CHECKPOINT"
  evaluate
  report_if_last
}

# RUNS, OUT and OPTIONS from the words of the command line.
read_runs() {
  RUNS=() OPTIONS=() OUT=''
  while [ $# != 0 ]; do
    case $1 in
      --) shift && OPTIONS=("$@") && break ;;
      --out) OUT=${2:?--out wants a folder} && shift 2 ;;
      -*) fail "$1: options of launch/evaluate.py follow --, after the runs" 2 ;;
      *) RUNS+=("${1%/}") && shift ;;
    esac
  done
  [ ${#RUNS[@]} != 0 ] || fail "name the folder of a run; the first lines of slurm/coconut_eval.sh show how" 2
  local word
  for word in "${OPTIONS[@]}"; do
    case $word in --checkpoint* | --out*) fail "$word: each element has its own" 2 ;; esac
  done
  OUT=${OUT:-${RUNS[0]}}
}

# The finished stages of all runs, in order.
list_checkpoints() {
  local run stage
  CHECKPOINTS=()
  for run in "${RUNS[@]}"; do
    [ -d "$run" ] || fail "$run is no folder" 2
    for ((stage = 0; stage <= 1000; stage++)); do
      [ ! -f "$run/stage_$stage/done.json" ] || CHECKPOINTS+=("$run/stage_$stage")
    done
  done
  [ ${#CHECKPOINTS[@]} != 0 ] || fail "no finished stage in ${RUNS[*]} (RUN/stage_K/done.json)" 2
}

marker() { printf '%s/eval/%s/evaluated-%s' "${1%/*}" "${1##*/}" "$ARRAY"; }

evaluate() {
  local step folder=$RUN/eval/${CHECKPOINT##*/}
  use_ports
  on_nodes "$LOGS/node-NODE.log" ranks launch/evaluate.py --checkpoint "$CHECKPOINT" --out "$folder" "${OPTIONS[@]}" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    # What is answered is on disk: nothing needs saving.
    [ -z "$STOPPING" ] || kill -TERM "$step" 2>/dev/null || true
    sleep 1 &
    wait -n "$step" $! || true
  done
  if wait "$step"; then
    touch "$(marker "$CHECKPOINT")"
    return 0
  fi
  sleep 3 # at a requeue or scancel srun gets its signal first, and this script a moment later
  [ "$STOPPING" != cancelled ] || exit 143
  [ -z "$STOPPING" ] || requeue "time limit or preemption"
  tail -n 30 "$LOGS"/node-*.log >&2 || true
  fail "$CHECKPOINT could not be evaluated; the logs are in $LOGS"
}

report_if_last() {
  local checkpoint
  for checkpoint in "${CHECKPOINTS[@]}"; do
    [ -f "$(marker "$checkpoint")" ] || return 0
  done
  mkdir -p "$OUT"
  local guard
  exec {guard}>"$OUT/.report.guard"
  flock --nonblock "$guard" || return 0 # another that ended in the same instant writes it
  [ -f "$(marker "$CHECKPOINT")" ] || return 0 # and has done so
  on_one "$COCONUT_PYTHON" launch/report.py "${RUNS[@]}" --out "$OUT/report" ||
    fail "the report could not be written; \`scontrol requeue $ELEMENT\` tries again"
  for checkpoint in "${CHECKPOINTS[@]}"; do rm -f "$(marker "$checkpoint")"; done
  say "all ${#CHECKPOINTS[@]} stages are evaluated; report: $OUT/report/index.html"
}

main "$@"
exit 0
