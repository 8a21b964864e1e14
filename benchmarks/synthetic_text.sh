#!/usr/bin/env bash
# The quality of synthetic text at epsilon 8: two generators on a real model and real text, compared with generators
# without privacy, the untrained model, and real text. Hours on two cores. After an interruption run the same line again.
#   make demo                                   # once: writes .demo/SmolLM2-135M
#   benchmarks/synthetic_text.sh STUDY CHAT.jsonl ABSTRACTS_TRAIN.jsonl ABSTRACTS_HELD_OUT.jsonl [RESULT.md]
# DATA="abstracts" does one of the two, chat or abstracts. Formats: see benchmarks/synthetic_text_data.py.
# Files go to STUDY, outputs/study-* and inference_outputs/study-*.
set -euo pipefail
study=$1 chat=$2 train=$3 held_out=$4 result=${5:-$1/result.md}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
model=${MODEL:-.demo/SmolLM2-135M} embedder=${EMBEDDER:-tfidf} # or a sentence-transformers model, with .[embeddings]
data=${DATA:-chat abstracts}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

"$python" -m benchmarks.synthetic_text_data --chat "$chat" --abstracts_train "$train" --abstracts_held_out "$held_out" \
  --output_dir "$study"

# One setting each, without a search: with privacy the defaults of train_clm.py.
train() { # chat|abstracts, data set, prompt style, private batch size and epochs, epochs without privacy
  local common=(--data_dir "$study" --dataset_name "$2" --prompt_style "$3" --model_name_or_path "$model" --block_size 64 --per_device_train_batch_size 16
    --eval_freq 1000)
  local held_out=(--validation_file "$study/$1_held_out.jsonl")
  "$python" -m scripts.generate_train_command "${common[@]}" --job_sess "study-$1-private" --target_epsilon 8 --delta 1e-5 \
    --total_bs "$4" --num_train_epochs "$5" -- "${held_out[@]}"
  "$python" -m scripts.generate_train_command "${common[@]}" --job_sess "study-$1-plain" --target_epsilon -1 \
    --total_bs 32 --num_train_epochs "$6" --learning_rate 5e-4 -- "${held_out[@]}"
}
sample() { # chat|abstracts, instruction file, prompt style
  local who adapter
  for who in private plain untrained; do
    adapter=(--adapter_path "outputs/study-$1-$who")
    [ "$who" = untrained ] && adapter=()
    "$python" -m scripts.generate_inference_command --instruction_file "$2" --model_name_or_path "$model" "${adapter[@]}" \
      --job_sess "study-$1-$who" --prompt_style "$3" --block_size 64 --batch_size 64 --top_p 0.95 -- --seed 1
  done
}
compare() { # chat|abstracts, file of samples, its text column, training file, text column of the real files
  local from=inference_outputs/study-$1
  "$python" -m scripts.evaluate_synthetic --output_dir "$study/$1" --names private plain "untrained model" \
    --synthetic_file "$from-private/$2" "$from-plain/$2" "$from-untrained/$2" --text_column "$3" \
    --embedder "$embedder" --held_out_file "$study/$1_held_out.jsonl" --train_file "$study/$4" --real_column "$5"
}

run_chat() {
  train chat chat_train uncond_generation 512 4 1
  sample chat "$study/how_many.txt" uncond_generation
  compare chat generations.jsonl text chat_train.jsonl instruction
}
run_abstracts() {
  train abstracts labelled_abstracts plain 256 1.5 1
  sample abstracts "$study/topics.txt" plain
  compare abstracts generations.jsonl text labelled_abstracts.jsonl answer
  "$python" -m benchmarks.contamination --model_name_or_path "$model" --file "$held_out" --output "$study/contamination.json"
}

for name in $data; do
  "run_$name"
done
# shellcheck disable=SC2086 # words of $data are arguments
"$python" -m benchmarks.synthetic_text --study "$study" --data $data --output "$result"
