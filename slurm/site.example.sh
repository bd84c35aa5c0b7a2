# shellcheck shell=bash disable=SC2034
# What is particular to your cluster: copy to slurm/site.sh (git ignores it) and change what you need. Job scripts read it
# inside the job; a value set here wins over one from the environment, unless written as NAME=${NAME:-value} as below.
# Each line shows the default.

# -- how sbatch is called: it reads these itself, so run `. slurm/site.sh` in your shell before it --
#export SBATCH_PARTITION=main
#export SBATCH_ACCOUNT=project
#export SBATCH_TIMELIMIT=24:00:00
#export SBATCH_QOS=normal
# Nodes and GPUs have no such variable: sbatch --nodes=2 --gres=gpu:8 --cpus-per-task=64 slurm/coconut_stage.sh ...

# -- the run --
COCONUT_CONFIG=${COCONUT_CONFIG:-args/demo.yaml}               # where the command line names no YAML file
COCONUT_DEEPSPEED=${COCONUT_DEEPSPEED:-ds_configs/zero3.json}  # where it has no deepspeed=...
COCONUT_RANKS_PER_NODE=${COCONUT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
COCONUT_LAUNCHER=${COCONUT_LAUNCHER:-torchrun}                 # or deepspeed (its launcher, with --no_ssh)
COCONUT_MAX_RESTARTS=${COCONUT_MAX_RESTARTS:-20}               # of one element, whatever the reason
#COCONUT_CHAIN=1                                               # one job a stage, see docs/slurm.md

# -- the machines --
#COCONUT_PYTHON=/path/to/python                                # .venv/bin/python of the project, else python3; in a container python3
#COCONUT_SETUP='module load cuda; source activate coconut'     # on each node before anything else; inside pyxis' containers,
                                                               # outside apptainer's
#COCONUT_CONTAINER=apptainer:/images/coconut.sif               # or pyxis:registry#image; then COCONUT_PYTHON is inside it
#COCONUT_MOUNTS=/data:/data                                    # mounted besides the project's folder, by commas
#COCONUT_NETWORK=ib0                                           # interface of NCCL and gloo
COCONUT_MIN_FREE_GB=${COCONUT_MIN_FREE_GB:-1}                  # free space that the run's disk must have

# -- for libraries; anything you export reaches every rank --
#export TORCH_EXTENSIONS_DIR=/path                             # .cache/torch_extensions; built by launch/setup.sh
#export TRITON_CACHE_DIR=/path                                 # a folder of the job below SLURM_TMPDIR, TMPDIR or /tmp
#export OMP_NUM_THREADS=8                                      # --cpus-per-task over ranks a node, else 1
#export NCCL_DEBUG=WARN
#export TORCH_NCCL_ASYNC_ERROR_HANDLING=1                      # a rank that dies ends the others' collectives
#export TOKENIZERS_PARALLELISM=false

# COCONUT_SITE (another file in place of slurm/site.sh) and COCONUT_ROOT (the project's folder, where you do not submit from
# it; sbatch needs --chdir=$COCONUT_ROOT as well) belong into the environment, as they are needed before this file is found.
