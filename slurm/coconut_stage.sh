#!/usr/bin/env bash
#SBATCH --job-name=coconut
#SBATCH --array=0-4%1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm/logs/%x-%A_%a.out
#
# Trains the stages of a run, one array element a stage, through time limits, preemption and failures.
#
#   sbatch slurm/coconut_stage.sh                                       the arrow maze, stages 0 to 4
#   sbatch --array=0-6 --nodes=2 --gres=gpu:8 slurm/coconut_stage.sh args/mine.yaml learning_rate=5e-6
#   sbatch --array=2-4 slurm/coconut_stage.sh                           from stage 2 on; 1 must be finished
#
# From the project's folder. The same command goes on where the run stands. Never edit this file: options on the command
# line and SBATCH_... variables win over the lines above; all other settings are in slurm/site.example.sh.
# docs/slurm.md draws the life of an array.
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
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this is one stage of a job array: start it with sbatch [--array=0-K]" 2
  ARRAY=$SLURM_ARRAY_JOB_ID STAGE=$SLURM_ARRAY_TASK_ID RESTARTS=${SLURM_RESTART_COUNT:-0}
  ELEMENT=${ARRAY}_$STAGE FIRST=${SLURM_ARRAY_TASK_MIN:-$STAGE} END=${SLURM_ARRAY_TASK_MAX:-$STAGE}
  STOPPING=''
  trap 'STOPPING=limit' USR1   # of the time limit or of a preemption: save, and start again
  trap 'STOPPING=cancelled' TERM # the scheduler has decided already what comes after
  chain_elements               # before anything can fail
  read_settings
  read_arguments "$@"
  say "element $ELEMENT, restart $RESTARTS, on $SLURM_JOB_NODELIST: $CONFIG ${OVERRIDES[*]}"
  read_run
  refuse_to_begin_anew
  check_array
  mkdir -p "$RUN/slurm"
  take_lock
  wait_for_stage_before
  if is_finished; then
    say "stage $STAGE is finished already"
  else
    LOGS=$RUN/slurm/$ELEMENT-restart-$RESTARTS
    mkdir -p "$LOGS"
    record
    preflight
    train_stage
  fi
  finish
}

# The header cannot read our YAML, so the numbers may not fit the run.
check_array() {
  if [ "$STAGE" -gt "$LAST" ]; then
    say "nothing to do: this run's last stage is $LAST"
    exit 0
  fi
  [ "$STAGE" = "$FIRST" ] || return 0
  [ "$RESTARTS" = 0 ] || return 0
  [ "${SLURM_ARRAY_TASK_COUNT:-1}" = $((END - FIRST + 1)) ] || refuse "this array leaves stages out"
  [ -n "${COCONUT_CHAIN:-}" ] || [ "$END" -ge "$LAST" ] || refuse "this array ends before the last stage"
}

refuse() { # the elements between steps do not exist: the others wait for this one
  local later
  for ((later = STAGE + 1; later <= END; later++)); do
    scontrol update "JobId=${ARRAY}_$later" "Dependency=afterok:$ELEMENT" 2>/dev/null || true
  done
  fail "$1; submit with --array=$STAGE-$LAST%1" 2
}

wait_for_stage_before() {
  [ "$STAGE" -gt 0 ] || return 0
  ! stage_done $((STAGE - 1)) || return 0
  if [ "$STAGE" -gt "$FIRST" ] && job_is_listed "${ARRAY}_$((STAGE - 1))"; then
    postpone
  fi
  ! stage_done $((STAGE - 1)) || return 0 # it ended between the two looks
  fail "stage $((STAGE - 1)) is not finished ($RUN/stage_$((STAGE - 1))/done.json is missing); submit from there, or from 0" 2
}

# What ran: revision, command, settings. The trainer itself writes the resolved configuration to RUN/config.yaml.
record() {
  {
    echo "element    $ELEMENT, restart $RESTARTS, job $SLURM_JOB_ID"
    echo "nodes      $SLURM_JOB_NODELIST, $COCONUT_RANKS_PER_NODE rank(s) a node, $COCONUT_LAUNCHER"
    echo "revision   $(git rev-parse HEAD 2>/dev/null || echo 'no git checkout')"
    { git status --short --untracked-files=no 2>/dev/null || true; } | sed 's/^/changed    /'
    echo "arguments  --config $CONFIG ${OVERRIDES[*]}"
    env | grep -E '^(COCONUT|NCCL|GLOO|TORCH|OMP|CUDA|TRITON|HF|SLURM_JOB)_' | sort | sed 's/^/setting    /'
  } >"$LOGS/started.txt"
}

# A short examination of every node; one that fails it is left out at the next start.
preflight() {
  local node bad=() all
  say "examining $SLURM_JOB_NODELIST; the reports are in $LOGS/preflight-NODE.txt"
  on_nodes "$LOGS/preflight-NODE.txt" "$COCONUT_PYTHON" launch/doctor.py --quick --run "$RUN" \
    --ranks "$COCONUT_RANKS_PER_NODE" --gpus "${SLURM_GPUS_ON_NODE:-0}" --min-free-gb "$COCONUT_MIN_FREE_GB" || true
  mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  for node in "${all[@]}"; do
    grep -qs '^doctor: all is well' "$LOGS/preflight-$node.txt" || bad+=("$node")
  done
  [ -z "$STOPPING" ] || stopped
  [ ${#bad[@]} != 0 ] || return 0
  for node in "${bad[@]}"; do
    sed "s/^/$node: /" "$LOGS/preflight-$node.txt" >&2 || say "$node: no report" >&2
  done
  [ "$(nodes_besides "${bad[@]}")" -ge "$SLURM_JOB_NUM_NODES" ] ||
    fail "${bad[*]} unfit (the reports stand above), and $SLURM_JOB_PARTITION has not $SLURM_JOB_NUM_NODES other node(s)"
  requeue "unfit: ${bad[*]}" "${bad[@]}"
}

train_stage() {
  local before step code=0
  use_ports
  before=$(newest_checkpoint)
  rm -f "$RUN/stopped.json" # of a start before this one
  note "stage $STAGE starts${before:+ from ${before##*/}}"
  on_nodes "$LOGS/node-NODE.log" ranks launch/train.py --config "$CONFIG" "${OVERRIDES[@]}" stop_after_stage="$STAGE" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    # Again and again: a trainer that is only starting removes the stop file of the one before it.
    [ -z "$STOPPING" ] || touch "$RUN/stop"
    sleep 1 &
    wait -n "$step" $! || true # a signal ends the wait at once
  done
  if [ -n "$STOPPING" ]; then
    rm -f "$RUN/stop"
  fi
  wait "$step" || code=$?
  judge "$code"
}

# What became of the stage, by what lies on the disk: exit codes of killed ranks say little.
judge() {
  local code=$1 crashed=$RUN/slurm/crashed-in-stage-$STAGE now
  if is_finished; then
    rm -f "$crashed"
    note "stage $STAGE is finished"
    return 0
  fi
  sleep 3 # at a requeue or scancel srun gets its signal first, and this script a moment later
  [ -z "$STOPPING" ] || stopped
  rank_logs | xargs -0 tail -n 30 >&2 || true
  if [ -f "$RUN/stopped.json" ]; then
    note "stage $STAGE was stopped from outside: $(tr -d '\n' <"$RUN/stopped.json"); the same command goes on"
    exit 1
  fi
  if [ "$code" = 0 ]; then
    note "stage $STAGE ended well without being finished: max_steps or num_epochs are used up before its end"
    exit 1
  fi
  end_orphans
  # train.py leaves with 2 when configuration, data or checkpoint are at fault: starting again would not help.
  if grep -qsE 'exitcode *: 2 |return code = 2$' "$LOGS"/node-*.log; then
    note "stage $STAGE failed: $(said 'error: .*')"
    exit 2
  fi
  now=$(newest_checkpoint)
  if [ "$(cat "$crashed" 2>/dev/null)" = "$ARRAY at ${now:-the start}" ]; then
    note "stage $STAGE failed twice without a new checkpoint between; the logs are in $LOGS"
    exit 1
  fi
  echo "$ARRAY at ${now:-the start}" >"$crashed"
  mapfile -t lost < <(lost_nodes)
  requeue "the ranks of stage $STAGE died" "${lost[@]}"
}

# All that the ranks of this start wrote: torchrun brings it together a node, deepspeed leaves a file for each rank.
rank_logs() {
  local depth=1
  [ "$COCONUT_LAUNCHER" = torchrun ] || depth=9
  find "$LOGS" -maxdepth $depth -name 'node-*.log' -size +0 -print0 -o -path '*/node-*/*.log' -size +0 -print0 | sort -z
}
said() { { rank_logs | xargs -0 grep -hoE "$1" || true; } | head -n 1; }

# A slurmd that died may have left ranks behind, which train on and hold the run folder: stop them, and start again.
end_orphans() {
  local held owner
  held=$(said 'another run is writing to .*')
  [ -n "$held" ] || return 0
  owner=$(grep -oP 'SLURM job \K[0-9]+' <<<"$held") || owner=''
  if [ -z "$owner" ] || { [ "$owner" != "$SLURM_JOB_ID" ] && job_is_listed "$owner"; }; then
    note "stage $STAGE failed: $held"
    exit 2
  fi
  touch "$RUN/stop" # they leave at their next step, with a checkpoint
  sleep 15
  requeue "ranks of an earlier start still train: $held"
}

stopped() {
  if [ "$STOPPING" = cancelled ]; then
    note "stage $STAGE was ended by the scheduler"
    exit 143
  fi
  requeue "time limit or preemption"
}

finish() {
  if [ "$STAGE" = "$LAST" ]; then
    if [ ! -f "$RUN/report/index.html" ] || [ "$RUN/final/coconut.json" -nt "$RUN/report/index.html" ]; then
      on_one "$COCONUT_PYTHON" launch/report.py "$RUN"
    fi
    note "all stages are finished; report: $RUN/report/index.html"
    drop_lock
  elif [ -n "${COCONUT_CHAIN:-}" ]; then # the next stage is another job
    drop_lock
  fi
}

main "$@"
exit 0
