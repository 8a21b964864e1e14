"""A tiny GPT-2 on disk, texts with authors, and the command line of scripts/nlg_reddit/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import CORPUS, tiny_tokenizer

SIZES = [1, 2, 3, 5, 8, 13, 21, 34]  # texts of each author
NOBODYS = 53

COMMAND_LINE = (
    "--output_dir scratch --model_name_or_path gpt2 --block_size 128 --per_device_train_batch_size 32 "
    "--gradient_accumulation_steps 2 --eval_strategy steps --eval_steps 45 --log_level info "
    "--per_device_eval_batch_size 64 --eval_accumulation_steps 1 --seed 42 --target_epsilon 8 "
    "--clip_norm 1.0 --prediction_loss_only --weight_decay 0.01 --remove_unused_columns False "
    "--num_train_epochs 3 --logging_steps 5 --max_grad_norm 0 --lr_scheduler_type constant --learning_rate 1e-4 "
    "--disable_tqdm True --dataloader_num_workers 2 --label_names labels"
)


def save_tiny_gpt2(folder: Path) -> Path:
    """Model and tokenizer, with dropout in the model as GPT-2 has it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer), "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def corpus() -> list[dict[str, object]]:
    """140 texts: 87 of eight authors, 53 without an author; one text is empty."""
    authors = [f"u{n}" for n, size in enumerate(SIZES) for _ in range(size)] + [None] * NOBODYS
    authors = authors[::3] + authors[1::3] + authors[2::3]
    texts = [" ".join(CORPUS[n % 5].split()[: n % 11]) + f" {n}" for n in range(len(authors) - 1)] + [""]
    return [{"text": text, "user": author} for text, author in zip(texts, authors, strict=True)]


def write_corpus(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus()))
    return path
