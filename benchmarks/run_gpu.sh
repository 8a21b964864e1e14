#!/usr/bin/env bash
# The benchmarks on one GPU, without any download. LoRA, under 8 minutes: Llama shapes of 1B and 7B with random weights,
# bfloat16, T=512. All parameters: GPT-2 small's shape, float32, T of 128 and 512. This needs torch, transformers and
# dptune's dependencies. Peers that are not installed are left out.
#   benchmarks/run_gpu.sh              (or PYTHON=python3 benchmarks/run_gpu.sh, with the packages installed there)
# Without Opacus: CONTENDERS="private plain peft" FULL_CONTENDERS="private plain hugging-face". To run only one of the
# two benchmarks, set FULL_SHAPES= or SHAPES= to nothing. To try the script on any machine:
#   SHAPES=tiny FULL_SHAPES=gpt2-tiny FULL_FLAGS="--block 16" DEVICE=cpu DTYPE=float32 BLOCK=32 DRAW=8 ROUNDS=2 OUTPUT_DIR=/tmp/results benchmarks/run_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
output=${OUTPUT_DIR:-benchmarks/results}
device=${DEVICE:-cuda}
export HF_HUB_OFFLINE=1

name=$device
if [ "$device" = cuda ]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
fi

# Peak memory needs one process per contender, so only the fixed setting measures it. Steps have 32 examples or more, as
# in real runs: noise is prepared during the step, and a step of one batch would be too short to hide it.
for shape in ${SHAPES-llama-1b llama-7b}; do
  common=(--shape "$shape" --device "$device" --dtype "${DTYPE:-bfloat16}" --batch 4 --warmup 2 --rounds "${ROUNDS:-5}"
    --max_seconds 45 --contenders ${CONTENDERS:-private plain peft opacus opacus-ghost})
  result=$output/step_${name}_${shape}_$(date +%Y-%m-%d)
  "$python" -m benchmarks.step "${common[@]}" --setting fixed --block "${BLOCK:-512}" --accumulate 8 --output "$result-fixed.md"
  "$python" -m benchmarks.step "${common[@]}" --setting ragged --ragged_block "${BLOCK:-512}" --draw "${DRAW:-64}" --no_memory \
    --output "$result-ragged.md"
done

# The largest micro-batch is predicted for the whole card, from sizes that are large enough for the line to hold.
limit=24
if [ "$device" = cuda ]; then
  limit=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory // 2**30)')
fi
for shape in ${FULL_SHAPES-gpt2-small}; do
  "$python" -m benchmarks.full_finetuning --shape "$shape" --device "$device" --block 128 512 --batch 8 --accumulate 4 1 \
    --warmup 2 --rounds "${ROUNDS:-5}" --max_seconds 45 --limit_gib "$limit" --limit_tokens 8192 16384 24576 \
    --contenders ${FULL_CONTENDERS:-private plain hugging-face opacus opacus-ghost} \
    --output "$output/full_finetuning_${name}_${shape}_$(date +%Y-%m-%d).md" ${FULL_FLAGS:-}
done
