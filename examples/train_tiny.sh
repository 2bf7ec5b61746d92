#!/usr/bin/env bash
# Trains demonstration weights from nothing, both stages, on two CPU cores. `make train-tiny` calls it.
#
# Interrupted, it goes on where it stopped: every step keeps its checkpoints in runs/ and resumes from the newest.
set -euo pipefail

out=src/synermedgen_hf/checkpoints/synermedgen-tiny

# 1. Simulated patients (kept in runs/phantom) and the autoencoder. (That of the bundled weights was trained with PET on
# a linear scale, and works with it on this one.)
python examples/train_vae.py --intensity examples/recipes/windows_tiny.json --output_dir runs/vae \
    --max_train_steps 2000 --resume_from_checkpoint latest

# 2. Random transformer, tokenizer, image processor, and that autoencoder; then what a base model brings along.
python examples/init_tiny.py --vae runs/vae/vae --output_dir runs/tiny-init
test -e runs/tiny-base/model_index.json ||
    python examples/pretrain_tiny.py --pretrained_model_name_or_path runs/tiny-init --output_dir runs/tiny-base

# 3. Stage I: the understanding expert, on questions.
python examples/train_understanding.py --config examples/recipes/understanding_tiny.yaml --resume_from_checkpoint latest

# 4. Stage II: the generation expert, by flow matching over all 22 routes, first with 64 tokens a picture, then with 256.
python examples/train_generation.py --config examples/recipes/generation_tiny.yaml --resume_from_checkpoint latest
python examples/finer_tokens.py --pretrained_model_name_or_path runs/tiny/pipeline --output_dir runs/tiny-finer
python examples/train_generation.py --config examples/recipes/generation_tiny_fine.yaml --resume_from_checkpoint latest

# What is bundled is rounded, so it is the rounded weights that are judged.
python - <<'EOF'
import torch
from synermedgen_hf import SynerMedGenPipeline

pipe = SynerMedGenPipeline.from_pretrained("runs/tiny-fine/pipeline", dtype=torch.bfloat16)
pipe.save_pretrained("runs/tiny-fine/rounded")
EOF

# 5. On subjects that none of the above has seen: answers, and syntheses beside what they have to beat.
synermedgen evaluate-understanding --model runs/tiny-fine/rounded --phantom-cases 10 --output runs/tiny-fine/answers
judge() {
    synermedgen evaluate --phantom-cases 8 --slice-step 24 --protocol paper_frame --model runs/tiny-fine/rounded \
        --output "runs/tiny-fine/$1" "${@:2}"
}
judge copying --baseline copy
judge mapping --baseline mapping
judge ceiling --baseline ceiling
judge mean-of-8 --samples 8
judge evaluation

# 6. One repository with its card; the code is in the package. Beside the weights: how they were made.
python - "$out" <<'EOF'
import sys

import torch
from synermedgen_hf import SynerMedGenPipeline

pipe = SynerMedGenPipeline.from_pretrained("runs/tiny-fine/rounded", dtype=torch.bfloat16)
card = {
    "training_data": "Stage I (CTS, TIA, MI) on questions about 240 simulated patients, Stage II on slices of 800 (brain, "
    "pelvis, whole body) of synermedgen_hf.data.phantom in all 22 routes, 128 pixels, and no real scan. `training/` "
    "holds the logs and arguments of the trainings and the evaluations; `make train-tiny` in a clone does it all again.",
    "evaluation": "runs/tiny-fine/evaluation",
}
pipe.save_pretrained(sys.argv[1], remote_code=False, card=card)
EOF
mkdir -p "$out/training/evaluation"
cp runs/vae/log.jsonl "$out/training/vae_log.jsonl"
cp runs/vae/training_args.json "$out/training/vae_args.json"
cp runs/tiny-base/log.jsonl "$out/training/base_log.jsonl"
cp runs/tiny-understanding/checkpoint-600/trainer_state.json "$out/training/understanding_state.json"
cp runs/tiny-fine/answers/summary.json "$out/training/understanding.json"
cp runs/tiny/log.jsonl "$out/training/generation_log.jsonl"
cp runs/tiny/training_args.json "$out/training/generation_args.json"
cp runs/tiny-fine/log.jsonl "$out/training/generation_fine_log.jsonl"
cp runs/tiny-fine/training_args.json "$out/training/generation_fine_args.json"
cp runs/tiny-fine/evaluation/summary.json "$out/training/evaluation/"
