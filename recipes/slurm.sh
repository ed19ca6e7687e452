#!/usr/bin/env bash
# Run a recipe on the nodes of a Slurm job:
#
#   sbatch --nodes 8 recipes/slurm.sh recipes/llama_1b.sh jreg
#
# In a container (enroot with pyxis), with the needed folders mounted:
#
#   SRUN_OPTIONS="--container-image=jreg.sqsh --container-mounts=$PWD --container-workdir=$PWD" sbatch ...
#
# Ten minutes before the time limit, and on a preemption, the run saves and the job is requeued. So the time limit must
# be much longer than ten minutes.
# Options on sbatch's command line override those below. Any command can take the place of the recipe.
#SBATCH --job-name=jreg
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "jreg_megatron: error: nothing to run here;" \
        "start it as: sbatch --nodes N recipes/slurm.sh recipes/llama_1b.sh jreg" >&2
    exit 2
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))  # jobs on one node need different ports
NODES=$SLURM_JOB_NUM_NODES
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
export MASTER_ADDR MASTER_PORT NODES GPUS

# --wait: without it the other nodes would wait for a failed node until NCCL's timeout.
# shellcheck disable=SC2086,SC2016  # options are several words; SLURM_NODEID is each node's own
srun --wait=120 --kill-on-bad-exit=0 ${SRUN_OPTIONS:-} bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' recipe "$@"
status=$?
if [[ $status -eq 75 ]]; then  # saved, but not finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
