# shellcheck shell=bash
# What the job scripts of this folder share. They set ROOT, the project's folder, before they read this file.
#
#   settings -> the environment, then slurm/site.sh, then the defaults below; slurm/site.example.sh explains each
#   run      -> which folder and which stages a configuration means (launch/stages.py)
#   lock     -> RUN/slurm/lock names the job that owns the run folder
#   chain    -> dependencies between array elements; requeue of this element alone

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }
fail() { # fail MESSAGE [EXIT CODE]
  say "error: $1" >&2
  exit "${2:-1}"
}

# -- settings --

read_settings() {
  local site=${COCONUT_SITE:-$ROOT/slurm/site.sh}
  if [ -r "$site" ]; then
    # shellcheck source=/dev/null
    . "$site"
  elif [ -n "${COCONUT_SITE:-}" ]; then
    fail "COCONUT_SITE=$COCONUT_SITE cannot be read; copy slurm/site.example.sh there, or unset it" 2
  fi
  local python=python3
  # An environment of this machine is of no use inside a container.
  [ ! -x "$ROOT/.venv/bin/python" ] || [ -n "${COCONUT_CONTAINER:-}" ] || python=$ROOT/.venv/bin/python
  export COCONUT_PYTHON=${COCONUT_PYTHON:-$python}
  export COCONUT_LAUNCHER=${COCONUT_LAUNCHER:-torchrun}
  export COCONUT_RANKS_PER_NODE=${COCONUT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  export COCONUT_CONTAINER=${COCONUT_CONTAINER:-} COCONUT_MOUNTS=${COCONUT_MOUNTS:-} COCONUT_SETUP=${COCONUT_SETUP:-}
  export COCONUT_MIN_FREE_GB=${COCONUT_MIN_FREE_GB:-1}
  COCONUT_CONFIG=${COCONUT_CONFIG:-args/demo.yaml}
  COCONUT_DEEPSPEED=${COCONUT_DEEPSPEED:-ds_configs/zero3.json}
  COCONUT_MAX_RESTARTS=${COCONUT_MAX_RESTARTS:-20}
  case $COCONUT_LAUNCHER in
    torchrun | deepspeed) ;;
    *) fail "COCONUT_LAUNCHER=$COCONUT_LAUNCHER: choose torchrun or deepspeed" 2 ;;
  esac
  local name
  for name in COCONUT_RANKS_PER_NODE COCONUT_MAX_RESTARTS COCONUT_MIN_FREE_GB; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name=${!name}: give a whole number" 2
  done
  [ "$COCONUT_RANKS_PER_NODE" -ge 1 ] || fail "COCONUT_RANKS_PER_NODE=0: give at least one rank a node" 2
  case $COCONUT_CONTAINER in
    '' | pyxis:?* | apptainer:?*) ;;
    *) fail "COCONUT_CONTAINER=$COCONUT_CONTAINER: write pyxis:IMAGE or apptainer:IMAGE" 2 ;;
  esac
  set_environment
}

# What every rank inherits; a value that is set already stays.
set_environment() {
  local threads=1
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || threads=$((SLURM_CPUS_PER_TASK / COCONUT_RANKS_PER_NODE))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} PYTHONUNBUFFERED=1
  # Compiled once by launch/setup.sh: a build started by many ranks at once would be waited for by all of them.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/triton-${SLURM_JOB_ID:-$$}}
  # A rank that dies must end the others' collectives, so that the element can start again.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  if [ -n "${COCONUT_NETWORK:-}" ]; then
    export NCCL_SOCKET_IFNAME=$COCONUT_NETWORK GLOO_SOCKET_IFNAME=$COCONUT_NETWORK
  fi
  # srun does not take this over from sbatch by itself since SLURM 22.05.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# Where the ranks of this job find each other; LOGS is the folder of this attempt.
use_ports() {
  local nodes
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below the ports that systems give out; another at each restart, as what is left of the last one may hold its own.
  export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * RESTARTS) % 12000))
  export COCONUT_RANK_LOGS=$LOGS
  printf "%s slots=$COCONUT_RANKS_PER_NODE\n" "${nodes[@]}" >"$LOGS/hostfile"
}

# One task on each node of the job: on_nodes LOG COMMAND...; NODE in LOG becomes the node's name.
on_nodes() {
  local -x COCONUT_NODE_LOG=$1
  shift
  local options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
  options+=(--kill-on-bad-exit=1 --cpu-bind=none --export=ALL) # whatever sbatch was told to take along
  [[ $COCONUT_CONTAINER != pyxis:* ]] ||
    options+=(--container-image="${COCONUT_CONTAINER#pyxis:}" --container-mounts="$(mounts)" --container-workdir="$ROOT")
  srun "${options[@]}" bash "$ROOT/slurm/node.sh" "$@"
}

# The same environment on one node only, for small work: on_one COMMAND... Outside of a job PLACE holds srun's options.
on_one() {
  if [[ $COCONUT_CONTAINER == pyxis:* ]]; then
    srun "${PLACE[@]}" --nodes=1 --ntasks=1 --cpu-bind=none --export=ALL --container-image="${COCONUT_CONTAINER#pyxis:}" \
      --container-mounts="$(mounts)" --container-workdir="$ROOT" bash "$ROOT/slurm/node.sh" "$@"
  else
    bash "$ROOT/slurm/node.sh" "$@"
  fi
}

PLACE=()
mounts() { printf '%s:%s%s' "$ROOT" "$ROOT" "${COCONUT_MOUNTS:+,$COCONUT_MOUNTS}"; }

# -- the run --

# CONFIG and OVERRIDES from the words of the command line: a YAML file first, then key=value.
read_arguments() {
  CONFIG=$COCONUT_CONFIG
  if [[ ${1:-} == *.yaml || ${1:-} == *.yml ]]; then
    CONFIG=$1
    shift
  fi
  local word deepspeed=$COCONUT_DEEPSPEED
  OVERRIDES=()
  for word in "$@"; do
    case $word in
      stop_after_stage=*) fail "$word: the array decides which stages run" 2 ;;
      deepspeed=*) deepspeed='' ;;
      ?*=*) ;;
      *) fail "$word: give a configuration file first, then key=value" 2 ;;
    esac
    OVERRIDES+=("$word")
  done
  [ -z "$deepspeed" ] || OVERRIDES+=("deepspeed=$deepspeed")
}

# RUN (its folder) and LAST (its last stage), from the configuration.
read_run() {
  local answer
  answer=$(on_one "$COCONUT_PYTHON" launch/stages.py --config "$CONFIG" "${OVERRIDES[@]}") ||
    fail "$CONFIG cannot be used; the reason stands above" 2
  RUN=$(sed -n 's/^run //p' <<<"$answer")
  LAST=$(sed -n 's/^last //p' <<<"$answer")
  RESUME=$(sed -n 's/^resume //p' <<<"$answer")
  [[ -n $RUN && $LAST =~ ^[0-9]+$ ]] || fail "launch/stages.py answered: $answer"
}

stage_done() { [ -f "$RUN/stage_$1/done.json" ]; }
# The last stage is followed by the test and RUN/final.
is_finished() { stage_done "$STAGE" && { [ "$STAGE" != "$LAST" ] || [ -f "$RUN/final/coconut.json" ]; }; }
newest_checkpoint() {
  { find "$RUN/checkpoints" -maxdepth 1 -type d -name 'step-*' 2>/dev/null || true; } | sort | tail -n 1
}

# Every stage and every restart is a start of its own: they have to find what the one before left.
refuse_to_begin_anew() {
  [ "$RESUME" = auto ] || fail "resume=$RESUME would begin there at every stage and restart; say resume=auto, and choose \
another name=... for a new run" 2
}

# One line a happening, for people and for `slurm/submit.sh --status`.
note() {
  say "$*"
  printf '%(%F %T)T\t%s\trestart %s\t%s\t%s\n' -1 "$ELEMENT" "$RESTARTS" "${SLURM_JOB_NODELIST:-}" "$*" \
    >>"$RUN/slurm/history.tsv"
}

# -- the lock --

# Own the run folder: RUN/slurm/lock holds the array's job number. It stays between elements, when no process runs.
take_lock() {
  local lock=$RUN/slurm/lock holder guard
  # Held while looking and writing only, and let go by the kernel whatever becomes of this script.
  { exec {guard}>"$lock.guard"; } 2>/dev/null || fail "$RUN/slurm cannot be written to"
  flock --wait 120 "$guard" || fail "$lock.guard is held; is another job starting in $RUN?" 3
  holder=$(cat "$lock" 2>/dev/null) || holder=''
  if [ "$holder" != "$ARRAY" ]; then
    if [ -n "$holder" ] && job_is_listed "$holder"; then
      fail "job $holder owns $RUN; wait for it, cancel it, or choose another name=..." 3
    fi
    { echo "$ARRAY" >"$lock.new" && mv "$lock.new" "$lock"; } || fail "$lock cannot be written; is the disk full?"
    [ -z "$holder" ] || note "took $RUN over from job $holder, which the scheduler no longer lists"
  fi
  exec {guard}>&-
}

drop_lock() {
  if [ "$(cat "$RUN/slurm/lock" 2>/dev/null)" = "$ARRAY" ]; then
    rm -f "$RUN/slurm/lock"
  fi
}

# Whether the scheduler still has the job; a scheduler that cannot answer counts as yes.
job_is_listed() {
  local answer
  if answer=$(squeue --noheader --jobs="$1" --format=%i 2>&1); then
    [ -n "$answer" ]
  else
    [[ $answer != *"Invalid job id"* ]]
  fi
}

# -- the chain --

# Each later element waits for the one before it; one that has started already sees to itself (`postpone`).
chain_elements() {
  local later before=$STAGE
  for ((later = STAGE + 1; later <= END; later++)); do
    scontrol update "JobId=${ARRAY}_$later" "Dependency=afterok:${ARRAY}_$before" 2>/dev/null || true
    before=$later
  done
}

# Back into the queue, until element STAGE-1 has ended well. For elements that the scheduler started too early.
postpone() {
  say "stage $((STAGE - 1)) is not finished yet; this element goes back into the queue until it is"
  trap '' TERM USR1 # the requeue ends this script; what follows has to run before that
  scontrol requeue "$ELEMENT" || fail "the scheduler does not requeue $ELEMENT; submit with --array=FIRST-LAST%1"
  # Possible now, while this script still runs and the element cannot start again.
  scontrol update "JobId=$ELEMENT" "Dependency=afterok:${ARRAY}_$((STAGE - 1))"
  exit 0
}

# This element alone starts again: requeue REASON [NODE TO LEAVE OUT]...
# Never by $SLURM_JOB_ID: the last element's is the array's, and every stage would run again.
requeue() {
  local reason=$1 nodes excluded
  shift
  if [ "$RESTARTS" -ge "$COCONUT_MAX_RESTARTS" ]; then
    note "gave up: $reason, and COCONUT_MAX_RESTARTS=$COCONUT_MAX_RESTARTS restarts are spent"
    exit 1
  fi
  note "starts again: $reason${*:+; without $*}"
  trap '' TERM USR1
  scontrol requeue "$ELEMENT" ||
    fail "the scheduler does not requeue $ELEMENT (docs/slurm.md, 'Where you may not requeue'); the same command goes on"
  if [ $# != 0 ]; then
    excluded=$(scontrol show job "$ELEMENT" --oneliner | grep -oP ' ExcNodeList=\K\S+') || excluded=''
    nodes=$(IFS=, && echo "$*")
    [ "$excluded" = '(null)' ] || [ -z "$excluded" ] || nodes=$excluded,$nodes
    scontrol update "JobId=$ELEMENT" "ExcNodeList=$nodes"
  fi
  exit 0
}

# How many nodes of the job's partition could take it, these left out: nodes_besides NODE...
nodes_besides() {
  local excluded
  excluded=$(scontrol show job "$ELEMENT" --oneliner | grep -oP ' ExcNodeList=\K\S+') || excluded=''
  [ "$excluded" != '(null)' ] || excluded=''
  {
    printf '%s\n' "$@"
    [ -z "$excluded" ] || scontrol show hostnames "$excluded"
  } | sort -u | comm -13 - <(usable_nodes) | wc -l
}
usable_nodes() {
  sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mixed,allocated,completing --format=%N | sort -u
}

# Nodes of this job that the scheduler has given up on.
lost_nodes() {
  sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down,drain,fail,no_respond --format=%N | sort -u
}
