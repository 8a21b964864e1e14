r"""Fine-tune a causal language model with differential privacy: LoRA adapters, or the model itself with --trainable.

    accelerate launch --config_file accelerate_configs/accelerate_config_nofsdp.cfg train_clm.py \
        --train_file my.json --model_name_or_path PATH --output_dir OUT --block_size 512 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 512 --num_train_epochs 5 \
        --clip_norm 1 --target_epsilon 8 --learning_rate 3e-4

`--clip_norm -1 --noise_multiplier -1` trains without privacy. `--dry_run` prints epsilon, noise, steps and memory of a
run, then stops. `--for_device "H100 80GB"` plans for a device that this machine lacks.

The average batch size per step is processes x --per_device_train_batch_size x --gradient_accumulation_steps. Divided by
the number of examples, it is the sampling probability. The number of steps is --num_train_epochs / that probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dptune._validate import refuse
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse
from utils.training.arguments import CAUSAL_LM_GROUPS as GROUPS
from utils.training.arguments import TRAINING_FLAGS, Groups

if TYPE_CHECKING:  # for types only: --help does not wait for torch and transformers
    from utils.generation.samples import TrainingSamples
    from utils.training.causal_lm.job import CausalLMJob


@exit_on_invalid_argument(*GROUPS, flags=TRAINING_FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train, with a lock on the output folder."""
    groups = Groups(*parse(*GROUPS, args=argv, description=__doc__))
    groups.refuse_unread(given_fields(argv, GROUPS))
    # Imported here, so that --help and a mistyped flag do not wait for torch and transformers.
    from utils.cli.launch import make_accelerator
    from utils.training.causal_lm.plan import plan_job
    from utils.training.causal_lm.run import run_job
    from utils.training.run import open_folder
    from utils.training.without_tokens import lacks_tokens, plan_without_tokens

    accelerator = make_accelerator()
    with open_folder(groups.output, accelerator) as folder:
        if why := lacks_tokens(groups):
            plan_without_tokens(groups, folder, why)
        else:
            job = plan_job(groups, folder)
            samples = samples_of(job)
            if not groups.output.dry_run:
                run_job(job, after_step=samples)
    accelerator.end_training()


def samples_of(job: CausalLMJob) -> TrainingSamples | None:
    """What samples from the model while it trains; None unless --sample_every asks for it."""
    output, folder = job.groups.output, job.folder
    if output.sample_every is None:
        return None
    from utils.cli.launch import sharding_of_launch
    from utils.generation.samples import TrainingSamples, read_prompts

    if sharding_of_launch() is not None:
        refuse(
            "--sample_every", output.sample_every, "samples on one process, which holds no whole model if it is sharded"
        )
    style = job.train.prompt_style or job.groups.data.prompt_style
    return TrainingSamples(
        output.sample_every,
        read_prompts(output.sample_prompts, style),
        style=style,
        tokenizer=job.tokenizer,
        folder=folder.path,
        max_length=job.groups.data.block_size,
        private=job.plan.privacy is not None,
        start=0 if folder.saved is None else folder.saved.step,
        is_main=folder.accelerator.is_main_process,
    )


if __name__ == "__main__":
    main()
