#!/bin/bash
# Pre-trains under Slurm on one or several nodes, and requeues itself at its time limit.
#
#   sbatch examples/cluster/slurm.sh kinetics400/mam2-fast --data train.csv --out /shared/runs/k400
#
# 300 seconds before the limit Slurm sends SIGUSR1 to every process of the run. They finish their step, rank 0 writes a
# checkpoint, and the run ends with status 138 (128 + SIGUSR1). The job is then requeued and resumes from the checkpoint.

#SBATCH --job-name=mam2
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mam2-%j.log

# Slurm starts one process per GPU, without torchrun, so that the signal reaches every process.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # two jobs on a node need two ports; connections take theirs from 32768 on
export MASTER_ADDR MASTER_PORT
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m mam2.engine pretrain "$@" --resume' mam2 "$@"
status=$?

if [ "$status" -eq 138 ]; then
    echo "near the time limit: saved, back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
