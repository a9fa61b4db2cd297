#!/bin/bash
# 8 nodes of 8 GPUs: sbatch tutorials/launch/slurm.sh, in a folder that all nodes share and that has the data.
#SBATCH --job-name=tiny-llama
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
. .venv/bin/activate
srun --kill-on-bad-exit=1 litgpt pretrain --config tinyllama-64-gpus --resume auto
