#!/usr/bin/env bash
# Train on several machines under Slurm. The job resumes by itself after a time limit, a preemption or a crash:
#
#     sbatch --nodes 2 scripts/slurm_train.sh --train_file my.json --model_name_or_path PATH --output_dir OUT \
#         --per_device_train_batch_size 4 --gradient_accumulation_steps 32 --clip_norm 1 --target_epsilon 8
#
# --output_dir must be on a disk that all machines share. Slurm sends SIGTERM two minutes before it ends the job. The run
# then finishes its micro-batch, saves and exits. The job is requeued and resumes with --resume_from_checkpoint latest.
#SBATCH --job-name=dptune
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

out=$(printf '%s\n' "$@" | grep -A1 -x -e --output_dir | tail -n 1)
noisy_steps() { if [ -e "$out/ledger.jsonl" ]; then wc -l <"$out/ledger.jsonl"; else echo 0; fi; }

names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # a pipe into head could end scontrol, and with it this job
first=${names%%$'\n'*}
before=$(noisy_steps)
status=0
# SLURM_NODEID differs per machine, so the inner shell reads it.
srun --kill-on-bad-exit=1 bash -c "exec accelerate launch \
    --config_file accelerate_configs/accelerate_config_two_machines.cfg --num_machines $SLURM_NNODES \
    --num_processes $((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8})) --machine_rank \$SLURM_NODEID \
    --main_process_ip $first --main_process_port ${MASTER_PORT:-29500} \
    train_clm.py --resume_from_checkpoint latest $(printf '%q ' "$@")" || status=$?

# A finished run has a report. An unfinished one is requeued only if it made a step; otherwise a mistake in the flags
# would be requeued for ever.
if [ ! -e "$out/publish/privacy_report.json" ] && [ "$(noisy_steps)" -gt "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
