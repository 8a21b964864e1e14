#!/usr/bin/env bash
# The whole pipeline, from a private generator to an assistant, on the demo's model and chats. Minutes on two cores.
#   make pipeline      (or PYTHON=.venv/bin/python bash scripts/pipeline.sh, with requirements.txt installed)
# The sizes are small, to show the stages and not their quality. The answers come from a local STUB without a model; for
# a real endpoint give scripts.annotate its --base_url and --model. The privacy unit is one row of the chats, not one
# person. --ignore_users confirms this: otherwise the scripts refuse to protect only rows of a file that names users.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
demo=.demo
job=pipeline-$(date +%Y%m%d-%H%M%S)
out=outputs/$job
model=$demo/SmolLM2-135M
delta=1e-6
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} # by default accelerate launch gives a CPU process one thread
stage() { printf '\n=== %s\n' "$*"; }

"$python" -m scripts.prepare_demo --output_dir "$demo"
mkdir -p "$out"

stage "A: train a generator of chat messages, epsilon 7"
"$python" -m scripts.generate_train_command --dataset_name train --data_dir "$demo/chitchat" --model_name_or_path "$model" \
  --job_sess "$job" --ignore_users --target_epsilon 7 --delta $delta --clip_norm 1 --total_bs 128 \
  --per_device_train_batch_size 16 --num_train_epochs 0.0119 --block_size 48 --learning_rate 5e-3 \
  --prompt_style uncond_generation --no_eval_at_start \
  -- --lora_r 4 --lora_target_modules q_proj v_proj --lr_scheduler_type constant

stage "B: sample messages from it"
printf ' #### 256\n' >"$out/how_many.txt"
"$python" -m scripts.generate_inference_command --instruction_file "$out/how_many.txt" --model_name_or_path "$model" \
  --adapter_path "$out/publish" --job_sess "$job" --block_size 40 --batch_size 64 --top_p 0.95 \
  --prompt_style uncond_generation

stage "resample: match the private chats' mix of topics, by a noisy histogram"
"$python" -m scripts.resample_with_dp_histogram --real_file "$demo/chitchat/train.jsonl" --ignore_users \
  --synthetic_file "inference_outputs/$job/instructions.jsonl" --output_dir "$out/resampled" \
  --num_buckets 20 --histogram_sigma 10 --num_samples 96 --budget_file "$out/budget.jsonl" --delta $delta

stage "annotate: a STUB answers the messages, not a model"
"$python" -m scripts.stub_endpoint --port 0 >"$out/stub_url.txt" &
stub=$!
trap 'kill $stub 2>/dev/null || true' EXIT
until [ -s "$out/stub_url.txt" ]; do
  kill -0 $stub # ends this script if the stub has ended
  sleep 1
done
OPENAI_API_KEY=none "$python" -m scripts.annotate --input_file "$out/resampled/resampled.jsonl" \
  --output_dir "$out/annotated" --base_url "$(cat "$out/stub_url.txt")" --model stub
kill $stub
"$python" -m scripts.split_dataset --input_file "$out/annotated/annotated.jsonl" --output_dir "$out/labelled_synthetic" \
  --val_share 0.1 --test_share 0.1

stage "C: train an assistant on the synthetic pairs, which costs no further epsilon"
"$python" -m scripts.generate_train_command --dataset_name labelled_synthetic --data_dir "$out" --model_name_or_path "$model" \
  --job_sess "$job-assistant" --target_epsilon -1 --synthetic_data --total_bs 16 \
  --per_device_train_batch_size 8 --num_train_epochs 1 --block_size 128 --prompt_style vicuna --learning_rate 1e-3

stage "D: sample answers from the assistant"
printf '%s\n' 'Hey, how is your day going?' 'What do you like to do on weekends?' >"$out/questions.txt"
"$python" -m scripts.generate_inference_command --instruction_file "$out/questions.txt" --model_name_or_path "$model" \
  --adapter_path "outputs/$job-assistant/publish" --job_sess "$job-assistant" --block_size 96 \
  --prompt_style vicuna -- --instruction_format lines --alpaca_eval_output

stage "total privacy cost"
"$python" -m dptune.budget "$out/budget.jsonl" --delta $delta
echo "synthetic messages: $out/resampled/resampled.jsonl"
echo "answers, in AlpacaEval's format: inference_outputs/$job-assistant/alpaca_eval.json"
