#!/usr/bin/env bash
# Two machines of eight cards under Slurm. Requeued or preempted, it goes on from the newest checkpoint. A step is the
# recipe's: twice the cards, and half of its accumulated batches.
#   sbatch examples/accelerate_configs/slurm.sh
#SBATCH --job-name=synermedgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=synermedgen-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export first

# srun does not take over how many cores the job has. In single quotes: SLURM_NODEID is another one on every machine.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'accelerate launch --config_file examples/accelerate_configs/fsdp2_two_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$first" \
    examples/train_generation.py --config examples/recipes/generation_full_8gpu.yaml \
    --gradient_accumulation_steps 2 \
    --pretrained_model_name_or_path runs/stage1/pipeline --data_dir /data/SynthRAD2023 \
    --output_dir runs/stage2 --latent_cache_dir runs/latents --resume_from_checkpoint latest'
