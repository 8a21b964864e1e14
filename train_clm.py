r"""Fine-tune a causal language model with LoRA under differential privacy (DP-SGD with AdamW).

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg train_clm.py \
        --train_file my.json --model_name_or_path PATH --output_dir OUT --block_size 512 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 512 --num_train_epochs 5 \
        --clip_norm 1 --target_epsilon 8 --learning_rate 3e-4

`--clip_norm -1 --noise_multiplier -1` trains without privacy; `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from transformers import get_scheduler

from dptune import (
    CausalLMLoss,
    GaussianNoise,
    Keystream,
    Ledger,
    PlainStep,
    PoissonSampler,
    PrivateStep,
    add_lora,
    deal,
    trainable_parameters,
)
from dptune.keystream import new_key
from utils.arguments import ModelArguments, exit_on_invalid_argument, parse, public_config
from utils.data import load_training_data
from utils.evaluation import held_out_loss
from utils.modeling import (
    checkpoint_activations,
    load_model,
    load_skeleton,
    load_tokenizer,
    make_accelerator,
    require_context,
    training_dtype,
)
from utils.run_log import RunLog, StepMetrics, summarise
from utils.run_outputs import finish_run, refuse_existing_run, start_run
from utils.run_plan import RunPlan, describe_data, describe_model, describe_plan, plan_run
from utils.tokenization import TokenizedDataset
from utils.trackers import start_trackers
from utils.training_arguments import (
    DataArguments,
    LoraArguments,
    OptimizationArguments,
    OutputArguments,
    PrivacyArguments,
)

GROUPS = (ModelArguments, DataArguments, PrivacyArguments, LoraArguments, OptimizationArguments, OutputArguments)


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, plan, load, train, write."""
    groups = parse(*GROUPS, args=argv, description=__doc__)
    model_args, data_args, privacy_args, lora_args, optimization, output = groups
    refuse_existing_run(output.output_dir)
    accelerator = make_accelerator()
    dtype = training_dtype(accelerator.mixed_precision, accelerator.device)
    name, hub = model_args.model_name_or_path, {"token": model_args.access_token, "revision": model_args.revision}
    lora = {"rank": lora_args.lora_r, "alpha": lora_args.lora_alpha, "targets": lora_args.lora_target_modules}

    skeleton = load_skeleton(name, **hub)
    require_context(skeleton, data_args.block_size)
    add_lora(skeleton, **lora)  # a wrong target is found here, before gigabytes are read
    tokenizer = load_tokenizer(name, **hub)
    train, held_out = load_training_data(tokenizer=tokenizer, **vars(data_args))
    plan = plan_run(privacy_args, optimization, num_examples=len(train), world_size=accelerator.num_processes)
    token_budget = optimization.max_tokens_per_device or optimization.per_device_train_batch_size * data_args.block_size
    accelerator.print(*describe_plan(plan), *describe_data(train, held_out), sep="\n")
    accelerator.print(
        *describe_model(skeleton, token_budget, dtype, checkpointing=optimization.gradient_ckpt), sep="\n"
    )
    if output.dry_run:
        return

    set_seed(optimization.seed)  # the adapters' start; noise and sampling are keyed from the operating system
    model = load_model(name, dtype=dtype, device=accelerator.device, **hub)
    add_lora(model, **lora)
    if optimization.gradient_ckpt:
        checkpoint_activations(model)
    folder, config = Path(output.output_dir), public_config(*groups)
    ledger = start_run(folder, config, private=plan.privacy is not None, is_main=accelerator.is_main_process)
    start_trackers(accelerator, output.report_to, "dptune", config, logging_dir=folder / "tracking")
    run = Run(accelerator, model, plan, ledger, train, held_out, token_budget, tokenizer.pad_token_id)
    with RunLog(folder, plan.steps, is_main=accelerator.is_main_process, track=accelerator.log) as log:
        noise = run.steps(log, optimization, output.eval_freq)
    accelerator.end_training()
    if accelerator.is_main_process:
        finish_run(folder, model, plan, ledger, noise=noise, base_model=name, diagnostics=log.rows)


@dataclass
class Run:
    """One training run on this process."""

    accelerator: Accelerator
    model: Any
    plan: RunPlan
    ledger: Ledger | None  # on the main process of a private run
    train: TokenizedDataset
    held_out: TokenizedDataset | None
    token_budget: int
    pad_token_id: int

    def steps(self, log: RunLog, settings: OptimizationArguments, eval_freq: int) -> GaussianNoise | None:
        """Train; returns what the noise came from, if there was noise."""
        optimizer = torch.optim.AdamW(
            trainable_parameters(self.model), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = get_scheduler(
            settings.lr_scheduler_type, optimizer, settings.num_warmup_steps, num_training_steps=self.plan.steps
        )
        losses = CausalLMLoss(self.model)
        sampler = PoissonSampler(self.plan.num_examples, self.plan.sampling_probability, self._shared_keystream())
        with self._step() as step:
            log.record(StepMetrics(step=0, eval_loss=self._evaluate(losses)))
            for number in range(1, self.plan.steps + 1):
                began = time.perf_counter()
                draw = sampler.draw()
                seen = []
                for rows in self._share_of(draw):
                    stats = step.backward(losses(**self._batch(rows)))
                    if len(rows):  # not the dummy of a rank that has run out of examples
                        seen.append(stats)
                step.finish()
                learning_rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                measured = summarise(
                    self._gathered([stats.losses for stats in seen]),
                    self._gathered([stats.norms for stats in seen]),
                    self.plan.privacy.clip_norm if self.plan.privacy else None,
                )
                seconds = time.perf_counter() - began
                evaluate = number % eval_freq == 0 or number == self.plan.steps
                log.record(
                    StepMetrics(
                        step=number,
                        batch_drawn=len(draw),
                        tokens=int(self.train.lengths[draw].sum()),
                        seconds=seconds,
                        learning_rate=learning_rate,
                        epsilon=self._running_epsilon(),
                        eval_loss=self._evaluate(losses) if evaluate else None,
                        **measured,
                    )
                )
            return step.noise

    def _step(self) -> PrivateStep | PlainStep:
        ranks: dict[str, Any] = {"gather": self.accelerator.gather, "world_size": self.accelerator.num_processes}
        if self.plan.privacy is None:
            return PlainStep(self.model, self.plan.expected_batch_size, **ranks)
        rank = self.accelerator.process_index
        return PrivateStep(self.model, self.plan.privacy, ledger=self.ledger, rank=rank, **ranks)

    def _shared_keystream(self) -> Keystream:
        """The ranks must see the same secret draws: the main process makes the key."""
        keys = [new_key() if self.accelerator.is_main_process else b""]
        return Keystream.shared(broadcast_object_list(keys)[0])

    def _share_of(self, draw: Any) -> list[Any]:
        world_size = self.accelerator.num_processes
        shares = deal(draw, self.train.lengths, token_budget=self.token_budget, ranks=world_size)
        return shares[self.accelerator.process_index]

    def _batch(self, rows: Any) -> dict[str, Tensor]:
        batch = self.train.batch(rows, self.pad_token_id)
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _gathered(self, values: list[Tensor]) -> Tensor:
        """All ranks' values, which differ in number."""
        return torch.tensor(gather_object(torch.cat(values).tolist() if values else []), dtype=torch.float64)

    def _running_epsilon(self) -> float | None:
        return self.ledger.running_epsilon(self.plan.privacy.delta) if self.ledger and self.plan.privacy else None

    def _evaluate(self, losses: CausalLMLoss) -> float | None:
        if self.held_out is None:
            return None
        self.model.eval()
        loss = held_out_loss(
            losses,
            self.held_out,
            token_budget=self.token_budget,
            pad_token_id=self.pad_token_id,
            device=self.accelerator.device,
            gather=self.accelerator.gather,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.model.train()
        return loss


if __name__ == "__main__":
    main()
