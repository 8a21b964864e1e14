#!/usr/bin/env bash
# The demo: fine-tune a real 135M-parameter Llama on chats of the Chit-Chat Challenge, at epsilon 8.
#   make demo          (or PYTHON=.venv/bin/python bash scripts/demo.sh, with requirements.txt installed)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "${DEMO_HOME:-$root}" # `dptune demo` sets it: the files go there
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-.venv/bin/python}
demo=.demo
run=$demo/run-$(date +%Y%m%d-%H%M%S) # a new folder each time, because a folder that holds a run is refused
launch=("$python" -m accelerate.commands.launch --config_file "$root/accelerate_configs/accelerate_config_nofsdp.cfg")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} # by default accelerate launch gives a CPU process one thread

"$python" -P -m scripts.prepare_demo --output_dir "$demo"

"${launch[@]}" "$root/train_clm.py" \
  --model_name_or_path "$demo/SmolLM2-135M" --base_model_name HuggingFaceTB/SmolLM2-135M-Instruct \
  --train_file "$demo/chitchat/train.jsonl" --validation_file "$demo/chitchat/validation.jsonl" \
  --output_dir "$run" --block_size 64 \
  --per_device_train_batch_size 16 --gradient_accumulation_steps 8 --max_train_steps 7 \
  --target_epsilon 8 --delta 1e-6 --clip_norm 1 --ignore_users --lora_r 4 --lora_target_modules q_proj v_proj \
  --learning_rate 5e-3 --lr_scheduler_type constant --eval_freq 7

cat >"$run/instructions.txt" <<'LINES'
Hey, how is your day going? #### 2
What do you like to do on weekends? #### 2
Do you have any brothers or sisters? #### 2
I just watched a really good movie. #### 2
If you could travel anywhere, where would you go? #### 2
LINES
"${launch[@]}" "$root/inference_generation_instruction.py" \
  --model_name_or_path "$demo/SmolLM2-135M" --lora_weights_path "$run/publish" \
  --instruction_file "$run/instructions.txt" --max_length 64 --output_dir "$run/generations"

"$python" - "$run/generations/generations.jsonl" <<'PRINT'
import json
import sys

for row in map(json.loads, open(sys.argv[1], encoding="utf-8")):
    print(f"> {row['prompt'].strip()}\n  {' '.join(row['text'].split())}")
PRINT
"$python" -P - "$demo/chitchat/train.jsonl" <<'PRINT'
import sys
from pathlib import Path

from scripts.prepare_demo import describe_unit

print(*describe_unit(Path(sys.argv[1])), sep="\n")
PRINT
"$python" -P -m dptune.verify "$run"
echo "what may be published, with the privacy report: $run/publish"
echo "plot of epsilon by step: $run/publish/epsilon.png"
echo "plot of the loss by step (not private): $run/diagnostics.png"
