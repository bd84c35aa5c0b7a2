#!/usr/bin/env bash
# Runs one command on one node, in the environment that the site asks for. Started by srun, once a node.
#
#   slurm/node.sh COMMAND...                 the command as it is
#   slurm/node.sh ranks SCRIPT ARGUMENT...   COCONUT_RANKS_PER_NODE ranks of a Python script, joined over all nodes
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
# Not srun's --output: its %N is the machine's name, which need not be the node's.
[ -z "${COCONUT_NODE_LOG:-}" ] || exec >>"${COCONUT_NODE_LOG//NODE/$SLURMD_NODENAME}" 2>&1
if [ -n "$COCONUT_SETUP" ]; then
  set +u # module systems and activation scripts read unset variables
  eval "$COCONUT_SETUP"
  set -u
fi

prefix=()
if [[ $COCONUT_CONTAINER == apptainer:* ]]; then
  prefix=(apptainer exec --pwd "$ROOT" --bind "$ROOT${COCONUT_MOUNTS:+,$COCONUT_MOUNTS}")
  [ ! -e /dev/nvidiactl ] || prefix+=(--nv)
  prefix+=("${COCONUT_CONTAINER#apptainer:}")
fi

[ "$1" = ranks ] || exec "${prefix[@]}" "$@"
shift
logs=$COCONUT_RANK_LOGS/node-$SLURMD_NODENAME
mkdir -p "$logs"
case $COCONUT_LAUNCHER in
  torchrun)
    launcher=(-m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID"
      --nproc-per-node="$COCONUT_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"
      --log-dir="$logs" --tee=3)
    ;;
  deepspeed)
    # Without ssh it reads from the host file only how many ranks there are, and this node's place among them.
    launcher=(-m deepspeed.launcher.runner --no_ssh --node_rank="$SLURM_NODEID" --hostfile="$COCONUT_RANK_LOGS/hostfile"
      --num_nodes="$SLURM_STEP_NUM_NODES" --num_gpus="$COCONUT_RANKS_PER_NODE"
      --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --enable_each_rank_log="$logs")
    ;;
esac
exec "${prefix[@]}" "$COCONUT_PYTHON" "${launcher[@]}" "$@"
