#!/usr/bin/env bash
# Submits a run with the array that its configuration needs, after asking the scheduler whether it would take it.
#
#   slurm/submit.sh args/mine.yaml learning_rate=5e-6 --nodes=2 --gres=gpu:8 --time=12:00:00
#   slurm/submit.sh --dry-run args/mine.yaml          prints the command, submits nothing
#   slurm/submit.sh --status args/mine.yaml           where the run stands: stage, step, restarts, time left
#   slurm/submit.sh --chain args/mine.yaml            one job a stage, where you may not requeue (docs/slurm.md)
#
# Words with a leading -- are sbatch's, written --name=value or --flag; the others are those of slurm/coconut_stage.sh. Stages that are
# finished are not submitted again.
set -eEuo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
. slurm/lib.sh

main() {
  local action=submit chain=${COCONUT_CHAIN:-} word sbatch=() words=()
  for word in "$@"; do
    case $word in
      --dry-run) action=dry-run ;;
      --status) action=status ;;
      --chain) chain=1 ;;
      --array*) fail "$word: the configuration says which stages there are" 2 ;;
      --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
      --partition=* | --account=* | --qos=* | --reservation=*) sbatch+=("$word") PLACE+=("$word") ;;
      --?*) sbatch+=("$word") ;;
      -*) fail "$word: write sbatch's options as --name=value" 2 ;;
      *) words+=("$word") ;;
    esac
  done
  read_settings
  read_arguments "${words[@]}"
  read_run
  refuse_to_begin_anew
  if [ "$action" = status ]; then
    status
    return
  fi
  local first=0
  while [ "$first" -le "$LAST" ] && stage_done "$first"; do first=$((first + 1)); done
  if [ "$first" -gt "$LAST" ]; then
    [ ! -f "$RUN/final/coconut.json" ] || { say "$RUN is finished; nothing to submit" && return; }
    first=$LAST
  fi
  local job=(slurm/coconut_stage.sh "${words[@]}")
  if [ -n "$chain" ]; then
    submit_chain "$first" "$action"
  else
    job=(sbatch "${sbatch[@]}" "--array=$first-$LAST%1" "${job[@]}")
    check "${job[@]}"
    printf '%s\n' "${job[*]@Q}"
    [ "$action" = dry-run ] || "${job[@]}"
  fi
}

# One job a stage, each after the one before.
submit_chain() {
  local stage before='' command
  for ((stage = $1; stage <= LAST; stage++)); do
    command=(sbatch --parsable "${sbatch[@]}" "--array=$stage" "${job[@]}")
    [ -n "$before" ] || check "${command[@]}"
    [ -z "$before" ] || command=("${command[@]:0:2}" "--dependency=afterok:$before" "${command[@]:2}")
    printf '%s\n' "COCONUT_CHAIN=1 ${command[*]@Q}"
    if [ "$2" = dry-run ]; then
      before="JOB-OF-STAGE-$stage"
    else
      before=$(COCONUT_CHAIN=1 "${command[@]}")
      say "stage $stage is job $before"
    fi
  done
}

# Ask the scheduler about a submission without making it.
check() {
  local answer
  if ! command -v sbatch > /dev/null; then
    [ "$action" = dry-run ] || fail "sbatch is not here: submit where SLURM is installed" 2
    say "no scheduler here, so none was asked"
    return
  fi
  mkdir -p slurm/logs
  answer=$(sbatch --test-only "${@:2}" 2>&1) || fail "the scheduler would refuse this: ${answer//$'\n'/; }" 2
  say "${answer##*sbatch: }"
}

status() {
  local done=() stage owner step
  for ((stage = 0; stage <= LAST; stage++)); do
    ! stage_done "$stage" || done+=("$stage")
  done
  local newest
  newest=$(newest_checkpoint)
  echo "run        $RUN, stages 0 to $LAST, finished: ${done[*]:-none}"
  echo "checkpoint ${newest:-none}"
  if [ -f "$RUN/metrics.jsonl" ]; then
    step=$(tail -n 1 "$RUN/metrics.jsonl" | grep -oP '"step": \K[0-9]+') || step='?'
    echo "step       $step, as last logged"
  fi
  [ ! -f "$RUN/final/coconut.json" ] || echo "final      $RUN/final"
  if [ -f "$RUN/slurm/history.tsv" ]; then
    echo "restarts   $(grep -cP '\trestart [1-9][0-9]*\t.*\tstage \d+ starts' "$RUN/slurm/history.tsv" || true)"
  fi
  owner=$(cat "$RUN/slurm/lock" 2>/dev/null || true)
  if [ -n "$owner" ] && job_is_listed "$owner"; then
    echo "job        $owner"
    squeue --array --jobs="$owner" --format='           %.14i %.12T %.12L left  %R' --noheader
  else
    echo "job        none in the queue"
  fi
  [ ! -f "$RUN/slurm/history.tsv" ] || tail -n 5 "$RUN/slurm/history.tsv" | sed 's/^/           /'
}

main "$@"
