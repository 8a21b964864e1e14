#!/usr/bin/env bash
# The benchmarks on one GPU, without any download, in under 8 minutes. By importance:
# 1. train_clm.py and inference_generation_dataset.py, launched as users do: Llama shapes of 1B and 7B with random
#    weights in bfloat16; the first is also resumed and sampled from. 2. One step of LoRA for the same shapes, beside
#    peers. 3. One step that trains all parameters: GPT-2 small's shape, float32, T of 128 and 512.
#   benchmarks/run_gpu.sh              (or PYTHON=python3 benchmarks/run_gpu.sh, with the packages installed there)
# This needs torch, transformers, accelerate, jinja2 and dptune's dependencies. Peers that are not installed are left
# out. What a machine without a network lacks may come in a folder. Beside an image of torch, transformers and peft,
# four packages in 20 MB were enough (for another Python, add its --python-version and --platform):
#   pip install --no-deps --only-binary=:all: --target FOLDER dp-accounting==0.6.0 cryptography cffi pycparser
#   PYTHONPATH=FOLDER PYTHON=python3 benchmarks/run_gpu.sh
#
# A part that fails or takes over PART_SECONDS stops no other. After SECONDS_IN_ALL none starts, and what runs is
# ended. The exit status is 1 if a part failed or was not run, and the last lines say which. The device is the machine's
# accelerator; only DEVICE=cpu takes the CPU. To leave parts out, set LAUNCH_SHAPES, SHAPES or FULL_SHAPES to nothing.
# Without Opacus: CONTENDERS="private plain peft" FULL_CONTENDERS="private plain hugging-face". With FULL_FLAGS= the
# third also measures memory and the largest micro-batch, which takes minutes more. To try the script on any machine:
#   LAUNCH_SHAPES=tiny LAUNCH_FLAGS="--block 64 --accumulate 2 --rows 40 --texts 2" SHAPES=tiny FULL_SHAPES=gpt2-tiny \
#   FULL_FLAGS="--block 16 --no_memory --no_largest_batch" DEVICE=cpu DTYPE=float32 BLOCK=32 DRAW=8 ROUNDS=2 \
#   OUTPUT_DIR=/tmp/results benchmarks/run_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
output=${OUTPUT_DIR:-benchmarks/results}
dtype=${DTYPE:-bfloat16}
seconds_in_all=${SECONDS_IN_ALL:-470}
part_seconds=${PART_SECONDS:-280}
export HF_HUB_OFFLINE=1

# Checkpoints of the models are written here, 14 GB at 7B, and deleted however the script ends. TMPDIR=/dev/shm keeps
# them in memory.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

# The device, its name in file names, and the GiB that the largest micro-batch is predicted for.
read -r device name limit < <("$python" -m benchmarks.devices "${DEVICE:-accelerator}")
today=$(date +%Y-%m-%d)
wrong=()

# part NAME COMMAND...: runs it within the time that is left, and goes on whatever becomes of it.
part() {
  local part=$1 began=$SECONDS seconds=$((seconds_in_all - SECONDS)) status=0
  shift
  if [ "$seconds" -le 0 ]; then
    wrong+=("$part: not run, no time was left")
    return
  fi
  [ "$seconds" -le "$part_seconds" ] || seconds=$part_seconds
  echo "== $part"
  timeout --kill-after 10 "$seconds" "$@" || status=$?
  case $status in
  0) ;;
  124 | 137) wrong+=("$part: ended after $seconds s") ;;
  *) wrong+=("$part: failed with status $status") ;;
  esac
  echo "== $part: status $status, $((SECONDS - began)) s, $SECONDS s in all"
}

# Word lists of several flags or names are split on purpose.
# shellcheck disable=SC2086
launches() {
  local shapes=${LAUNCH_SHAPES-llama-1b llama-7b}
  [ -n "$shapes" ] || return 0
  part "launches" "$python" -m benchmarks.launches --shapes $shapes --dtype "$dtype" \
    --output "$output/launches_${name}_$today.md" ${LAUNCH_FLAGS:-}
}

# Peak memory needs one process per contender, so only the fixed setting measures it. Steps have 32 examples or more, as
# in real runs: noise is prepared during the step, and a step of one batch would be too short to hide it.
# shellcheck disable=SC2086
lora_steps() {
  local shape setting flags
  for setting in fixed ragged; do
    for shape in ${SHAPES-llama-1b llama-7b}; do
      flags=(--block "${BLOCK:-512}" --accumulate 8)
      [ "$setting" = fixed ] || flags=(--ragged_block "${BLOCK:-512}" --draw "${DRAW:-64}" --no_memory)
      part "step, $shape, $setting" "$python" -m benchmarks.step --shape "$shape" --device "$device" --dtype "$dtype" \
        --batch 4 --warmup 2 --rounds "${ROUNDS:-5}" --max_seconds 15 --setting "$setting" "${flags[@]}" \
        --contenders ${CONTENDERS:-private plain peft opacus opacus-ghost} \
        --output "$output/step_${name}_${shape}_$today-$setting.md"
    done
  done
}

# The largest micro-batch is predicted for the whole card, from sizes that are large enough for the line to hold.
# shellcheck disable=SC2086
full_finetuning() {
  local shape
  for shape in ${FULL_SHAPES-gpt2-small}; do
    part "full fine-tuning, $shape" "$python" -m benchmarks.full_finetuning --shape "$shape" --device "$device" \
      --block 128 512 --batch 8 --accumulate 4 --warmup 2 --rounds "${ROUNDS:-5}" --max_seconds 10 \
      --limit_gib "$limit" --limit_tokens 8192 16384 24576 \
      --contenders ${FULL_CONTENDERS:-private plain hugging-face opacus opacus-ghost} \
      --output "$output/full_finetuning_${name}_${shape}_$today.md" ${FULL_FLAGS---no_memory --no_largest_batch}
  done
}

launches
lora_steps
full_finetuning
echo "== $SECONDS s in all"
if [ ${#wrong[@]} -gt 0 ]; then
  printf '== %s\n' "${wrong[@]}"
  exit 1
fi
