"""All flags of train_clm.py, and what a resumed run does about each. Each group of --help has a module of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from dptune._validate import refuse
from utils.cli.flags import refuse_unread
from utils.models.arguments import ModelArguments
from utils.training.card_arguments import CardArguments
from utils.training.changes import OnResume, OnResumeTable
from utils.training.clipping_arguments import ClippingArguments
from utils.training.data_arguments import DataArguments
from utils.training.lora_arguments import LoraArguments
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.output_arguments import OutputArguments
from utils.training.planning_arguments import PlanningArguments
from utils.training.privacy_flags import PrivacyFlags
from utils.training.view_arguments import ViewArguments

# Flags that only a private run reads. The others of privacy also say what is drawn, so runs without privacy read them.
ONLY_PRIVATE = (
    "noise_bands",
    "register",
    "target_epsilon",
    "delta",
    "clipping",
    "layer_clip_norms",
    "automatic_gamma",
    "adaptive_quantile",
    "adaptive_learning_rate",
    "adaptive_count_noise",
    "audit_canaries",
    "audit_dials",
)
ONLY_PLAIN = ("max_grad_norm",)  # that only a run without privacy reads
ONLY_DRY = ("for_device", "for_devices", "num_examples")  # that only a dry run reads
OF_ADAPTER = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules")  # what --initial_adapter decides
# {parameter, as the engine and shared code name it: flag of train_clm.py}.
TRAINING_FLAGS = {
    **dict.fromkeys(("model", "folder", "files"), "--model_name_or_path"),
    "path": "--initial_adapter",
    "rank": "--lora_r",
    "alpha": "--lora_alpha",
    "dropout": "--lora_dropout",
    "targets": "--lora_target_modules",
    "clip_norms": "--layer_clip_norms",
    "group_size": "--examples_per_unit",
    "expected_batch_size": "--gradient_accumulation_steps",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
    "register": "--register",
    "keep": "--save_total_limit",
}


class Groups(NamedTuple):
    """All flags of train_clm.py, in the order of --help."""

    model: ModelArguments
    data: DataArguments
    privacy: PrivacyFlags
    clipping: ClippingArguments
    lora: LoraArguments
    optimization: OptimizationArguments
    views: ViewArguments
    output: OutputArguments
    card: CardArguments
    planning: PlanningArguments

    def refuse_unread(self, given: Collection[str]) -> None:
        """Refuse flags, among those that were `given`, that this run would not read: of privacy if it is turned off, of
        planning in a run that is no dry run, of adapters if it has none."""
        if not self.output.dry_run:
            refuse_unread(given, ONLY_DRY, "is read only with --dry_run: give that too, or leave it out", *self)
        if self.planning.num_examples is not None and (self.data.train_file or self.data.dataset_name):
            remedy = "the data say how many there are; leave it out, or leave the data out"
            refuse("--num_examples", self.planning.num_examples, remedy)
        if self.privacy.settings() is None:
            remedy = "is not read without privacy: leave it out, or give --clip_norm and --noise_multiplier above 0"
            refuse_unread(given, ONLY_PRIVATE, remedy, *self)
        else:
            remedy = "is for runs without privacy: a private one limits each gradient before the sum; give --clip_norm"
            refuse_unread(given, ONLY_PLAIN, remedy, *self)
        if self.privacy.clip_norm_is_open and self.clipping.layer_clip_norms is not None:
            refuse(
                "--clip_norm", self.privacy.clip_norm, "--layer_clip_norms gives the clip norms; leave one of both out"
            )
        if self.lora.initial_adapter is not None:
            refuse_unread(given, OF_ADAPTER, "comes from --initial_adapter; leave it out", *self)
        if self.lora.trainable:
            remedy = "is for adapters, but --trainable trains the model's own weights; leave one of both out"
            refuse_unread(given, (*OF_ADAPTER, "lora_dropout"), remedy, *self)


CAUSAL_LM_GROUPS = (
    ModelArguments,
    DataArguments,
    PrivacyFlags,
    ClippingArguments,
    LoraArguments,
    OptimizationArguments,
    ViewArguments,
    OutputArguments,
    CardArguments,
    PlanningArguments,
)

# What a resumed run does about a changed flag. Every flag has a class.
ON_RESUME: OnResumeTable = {
    # the model
    "model_name_or_path": OnResume.COMPARED,
    "revision": OnResume.COMPARED,
    "qbits": OnResume.REFUSED,
    "attn_implementation": OnResume.RUNTIME,
    "access_token": OnResume.RUNTIME,
    # the data; tokens and labels are compared
    "dataset_name": OnResume.COMPARED,
    "dataset_config": OnResume.COMPARED,
    "dataset_split": OnResume.COMPARED,
    "train_file": OnResume.COMPARED,
    "train_file_weights": OnResume.COMPARED,
    "validation_file": OnResume.EFFECTIVE,
    "text_column": OnResume.COMPARED,
    "prompt_column": OnResume.COMPARED,
    "answer_column": OnResume.COMPARED,
    "messages_column": OnResume.COMPARED,
    "data_dir": OnResume.COMPARED,
    "date_from": OnResume.COMPARED,
    "date_to": OnResume.COMPARED,
    "block_size": OnResume.COMPARED,
    "prompt_style": OnResume.REFUSED,
    "data_cache": OnResume.RUNTIME,
    # privacy
    "clip_norm": OnResume.REFUSED,
    "noise_multiplier": OnResume.REFUSED,
    "target_epsilon": OnResume.REFUSED,
    "delta": OnResume.COMPARED,
    "register": OnResume.RUNTIME,  # whether there is one is compared; the file may move
    "privacy_unit": OnResume.REFUSED,
    "examples_per_unit": OnResume.REFUSED,
    "user_level_method": OnResume.REFUSED,
    "unit_gradient": OnResume.REFUSED,
    "max_batch": OnResume.REFUSED,
    "noise_bands": OnResume.REFUSED,
    "insecure_test_seed": OnResume.REFUSED,
    "audit_canaries": OnResume.REFUSED,
    "audit_dials": OnResume.REFUSED,
    "ignore_users": OnResume.RUNTIME,
    "clipping": OnResume.REFUSED,
    "layer_clip_norms": OnResume.COMPARED,
    "automatic_gamma": OnResume.REFUSED,
    "adaptive_quantile": OnResume.REFUSED,
    "adaptive_learning_rate": OnResume.REFUSED,
    "adaptive_count_noise": OnResume.REFUSED,
    # what is trained
    "trainable": OnResume.REFUSED,
    "initial_adapter": OnResume.COMPARED,
    "initial_adapter_is_public": OnResume.COMPARED,
    "lora_r": OnResume.REFUSED,
    "lora_alpha": OnResume.REFUSED,
    "use_rslora": OnResume.REFUSED,
    "lora_dropout": OnResume.EFFECTIVE,
    "lora_target_modules": OnResume.COMPARED,
    # optimisation
    "per_device_train_batch_size": OnResume.COMPARED,
    "gradient_accumulation_steps": OnResume.COMPARED,
    "max_tokens_per_device": OnResume.RUNTIME,
    "num_train_epochs": OnResume.EFFECTIVE,
    "max_train_steps": OnResume.EFFECTIVE,
    "optimizer": OnResume.REFUSED,
    "momentum": OnResume.EFFECTIVE,
    "learning_rate": OnResume.EFFECTIVE,
    "weight_decay": OnResume.EFFECTIVE,
    "lr_scheduler_type": OnResume.EFFECTIVE,
    "num_warmup_steps": OnResume.EFFECTIVE,
    "warmup_ratio": OnResume.EFFECTIVE,
    "ema": OnResume.REFUSED,
    "average_last": OnResume.REFUSED,
    "max_grad_norm": OnResume.REFUSED,
    "gradient_sync": OnResume.RUNTIME,
    "gradient_ckpt": OnResume.RUNTIME,
    "seed": OnResume.REFUSED,
    # views
    "views": OnResume.REFUSED,
    "token_dropout": OnResume.EFFECTIVE,
    # output
    "output_dir": OnResume.RUNTIME,
    "checkpointing_steps": OnResume.RUNTIME,
    "save_total_limit": OnResume.RUNTIME,
    "resume_from_checkpoint": OnResume.RUNTIME,
    "eval_freq": OnResume.RUNTIME,
    "eval_at_start": OnResume.RUNTIME,
    "early_stopping_patience": OnResume.REFUSED,
    "load_best_model_at_end": OnResume.REFUSED,
    "validation_is_public": OnResume.REFUSED,
    "sample_every": OnResume.RUNTIME,
    "sample_prompts": OnResume.RUNTIME,
    "with_tracking": OnResume.RUNTIME,
    "report_to": OnResume.RUNTIME,
    "dry_run": OnResume.RUNTIME,
    # the model card
    "base_model_name": OnResume.RUNTIME,
    "card_license": OnResume.RUNTIME,
    "card_language": OnResume.RUNTIME,
    "card_data": OnResume.RUNTIME,
    # planning
    **dict.fromkeys(ONLY_DRY, OnResume.RUNTIME),
}
