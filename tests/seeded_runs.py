r"""Record small seeded runs of every program and API, to check that a refactoring changes no result.

    python -m tests.seeded_runs before.json                   # on the commit before the change
    python -m tests.seeded_runs after.json --against before.json

Every run uses a fixed test seed, so two recordings on one machine are equal to the bit. Each holds the losses of all
steps, the SHA-256 of the trained weights, the ledger and epsilon. Processors round differently: compare recordings of
one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file

from tests.classifier_folders import save_bert, write_sst2
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"
_RANDOM_OR_SLOW = ("seconds", "time", "tokens_per_second", "written")  # keys that differ between equal runs

COMMON = {
    "block_size": 48,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_train_steps": 6,
    "learning_rate": 0.02,
    "clip_norm": 1,
    "noise_multiplier": 0.8,
    "delta": 1e-3,
    "insecure_test_seed": 3,
    "checkpointing_steps": 3,
    "eval_freq": 2,
}
CAUSAL_LM: dict[str, dict[str, object]] = {
    "lora": {"lora_r": 4, "lora_dropout": 0.1, "ignore_users": True},
    "lora-adaptive": {"lora_r": 4, "clipping": "adaptive", "ignore_users": True},
    "lora-epsilon": {"lora_r": 4, "noise_multiplier": None, "target_epsilon": 4, "ignore_users": True},
    "whole": {"trainable": "all", "optimizer": "dp-adam", "ignore_users": True},
    "whole-layers": {"trainable": "all", "clipping": "per-layer", "ignore_users": True},
    "plain": {"lora_r": 4, "clip_norm": -1, "noise_multiplier": -1, "delta": None},
    "authors": {"lora_r": 4, "privacy_unit": "user", "examples_per_unit": 3, "gradient_accumulation_steps": 1},
    "groups": {
        "lora_r": 4,
        "privacy_unit": "user",
        "examples_per_unit": 2,
        "user_level_method": "example-level",
        "gradient_accumulation_steps": 1,
    },
}
CLASSIFIER: dict[str, dict[str, object]] = {
    "full": {"enable_dp": True, "noise_multiplier": 1, "clip_norm": 0.5},
    "ia3": {"enable_dp": True, "target_epsilon": 6},
    "lora": {},
}


def write_rows(path: Path) -> Path:
    """60 instructions of nine authors, one of whom has twenty rows, and four rows without an author."""
    users = [f"u{author}" for author, rows in enumerate([1, 2, 2, 3, 5, 9, 6, 8, 20]) for _ in range(rows)]
    users = [*users[::2], "", None, " ", None, *users[1::2]]
    rows = [
        {"instruction": f"Repeat {n % 7}.", "answer": "word " * (1 + n % 6), "user": u} for n, u in enumerate(users)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command_line(settings: dict[str, object]) -> list[str]:
    """Flags with their values; True for a flag alone, None for a flag that is left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [w for name, value in given.items() for w in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def launch(line: list[str], log: Path) -> None:
    """Run a program at the top of the repository; its output is kept for the error message."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        subprocess.run(line, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=600, check=False)


def recording_of(folder: Path, log: Path) -> dict[str, Any]:
    """The results in the folder of a finished run, without times."""
    report = folder / "publish" / "privacy_report.json"
    if not report.exists():
        raise RuntimeError(f"{folder.name}: left no report\n{log.read_text()[-3000:]}")
    rows = [json.loads(line) for name in ("diagnostics.jsonl", "ledger.jsonl") for line in _lines(folder / name)]
    weights = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
    return {"report": _reduced(json.loads(report.read_text())), "rows": _reduced(rows), "weights": weights}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _sha256(path: Path) -> str:
    """Checksum of the values by name; other parts of a file's header may change."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def _reduced(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reduced(inner) for key, inner in value.items() if key not in _RANDOM_OR_SLOW}
    return [_reduced(inner) for inner in value] if isinstance(value, list) else value


def record(folder: Path) -> dict[str, Any]:
    """All runs, one after another, below `folder`."""
    llama, bert = save_tiny(folder / "llama"), save_bert(folder / "bert")
    data, glue = write_rows(folder / "rows.jsonl"), write_sst2(folder / "glue")
    found: dict[str, Any] = {}
    for name, changed in CAUSAL_LM.items():
        found[name] = _causal_lm(folder / name, [sys.executable], llama, data, changed)
    sharded = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    sharded += [str(CONFIGS / "accelerate_config.cfg")]
    out = folder / "two-sharded-ranks"
    found[out.name] = _causal_lm(out, sharded, llama, data, {"lora_r": 4, "ignore_users": True})
    for name, changed in CLASSIFIER.items():
        out, log = folder / f"classifier-{name}", folder / f"classifier-{name}.log"
        settings: dict[str, object] = {"model_name_or_path": bert, "datasets": "sst2", "data_dir": glue}
        settings |= {
            "output_dir": out,
            "block_size": 16,
            "batch_size": 24,
            "micro_batch_size": 8,
            "num_train_epochs": 1,
        }
        settings |= {
            "delta": 1e-3 if "enable_dp" in changed else None,
            "lora_r": 2,
            "insecure_test_seed": 3,
            "finetune_mode": name,
        } | changed
        launch([sys.executable, "train_classifier.py", *command_line(settings)], log)
        found[f"classifier-{name}"] = recording_of(out / "sst2", log)
    for name in ("trainer", "callback"):
        out, log = folder / f"{name}", folder / f"{name}.log"
        launch([sys.executable, "-m", "tests.seeded_runs", "unused", "--trainer", name, str(llama), str(out)], log)
        found[name] = recording_of(out, log)
    return found


def _causal_lm(out: Path, start: list[str], model: Path, data: Path, changed: dict[str, object]) -> dict[str, Any]:
    settings = {"model_name_or_path": model, "train_file": data, "validation_file": data, "output_dir": out}
    log = out.with_suffix(".log")
    launch([*start, "train_clm.py", *command_line({**COMMON, **settings, **changed})], log)
    return recording_of(out, log)


def train_with_trainer(kind: str, model_folder: Path, out: Path) -> None:
    """A run of `DPTrainer`, or of transformers' Trainer with the callback, on a whole Llama."""
    import transformers

    from dptune.integrations import transformers as ours
    from tests.examples import random_examples

    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    data = [{"input_ids": ids, "labels": labels} for ids, labels in random_examples(24)]
    privacy = ours.PrivacyArguments(clip_norm=0.5, target_epsilon=6.0, delta=1e-3, insecure_test_seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    collator = ours.DataCollatorForPrivateCausalLanguageModeling(tokenizer=tokenizer)
    settings: dict[str, Any] = {"output_dir": str(out), "per_device_train_batch_size": 2, "max_steps": 5}
    settings |= {"gradient_accumulation_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": []}
    settings |= {"use_cpu": True, "remove_unused_columns": False, "max_grad_norm": 0.0, "save_strategy": "no"}
    if kind == "trainer":
        args = ours.TrainingArguments(**settings)
        trainer = ours.DPTrainer(model, args, collator, data, privacy_args=privacy)
    else:
        args = transformers.TrainingArguments(**settings)
        engine = ours.PrivacyEngine(model, args, data, privacy)
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=engine.dataset,
            data_collator=collator,
            compute_loss_func=engine.loss,
            callbacks=[ours.PrivacyEngineCallback(engine)],
        )
    trainer.train()
    trainer.save_model(str(out))
    rows = [
        {name: row[name] for name in ("loss", "grad_norm", "epsilon") if name in row}
        for row in trainer.state.log_history
    ]
    (out / "diagnostics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Each place at which two recordings differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{where}.{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for number, (one, other) in pairs for d in differences(one, other, f"{where}[{number}]")]
    return [] if before == now else [f"{where.removeprefix('.')}: {before!r} became {now!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the recording to write, as JSON")
    parser.add_argument("--against", help="an earlier recording; the exit status is 1 if any value differs")
    parser.add_argument("--trainer", nargs=3, metavar=("KIND", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        kind, model, out = args.trainer
        train_with_trainer(kind, Path(model), Path(out))
        return
    with TemporaryDirectory() as folder:
        found = record(Path(folder))
    Path(args.output).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if args.against:
        changed = differences(json.loads(Path(args.against).read_text()), found)
        print(*changed, f"{len(found)} runs, {len(changed)} differences", sep="\n")
        raise SystemExit(1 if changed else 0)


if __name__ == "__main__":
    main()
