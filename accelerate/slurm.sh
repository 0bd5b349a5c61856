#!/bin/bash
# One torchrun per machine, which starts a process per GPU. Usage, with as many machines as you like:
#   sbatch --nodes 2 accelerate/slurm.sh runs/xl/config.json
# The configuration's num_processes is machines times GPUs. A killed job goes on when it is submitted again.
#SBATCH --job-name=arpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
config=${1:?usage: sbatch accelerate/slurm.sh CONFIG.json [OUT_DIR]}
out=${2:-$(dirname "$config")}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    -m arpo_nb.training.launch "$config" --out_dir "$out"
