r"""Plant faults that break privacy in silence, one at a time, and check that the tests named for each go red.

    python -m tests.planted                       # all of them: about half an hour on two quiet cores
    python -m tests.planted --only noise ledger   # those whose names contain one of these words
    python -m tests.planted --output table.md     # also write the table

Some of them break no privacy but fail or are slow where there is an accelerator, which the CPU alone does not show:
`--only accelerator`.

Each fault is a change of one place in a temporary copy of the tree. Nothing crashes with it and every output looks as
before, so that only a test can tell. A fault that is `missed` is a gap in the tests. `tests/test_planted.py` checks in
every run of the suite that each fault still fits the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
_IGNORED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "shared", "results", "*.egg-info")
_TESTS_RED, _TIMEOUT = 1, 600.0  # pytest's exit status; seconds


@dataclass(frozen=True)
class Fault:
    """One change that no user would notice.

    Attributes:
        name: what is broken.
        file: where, below the root.
        old: text that occurs once in it.
        new: what replaces it.
        tests: files, or single tests, at least one of which must fail.
        why: what the fault would cost.
        and_also: another pair of `old` and `new`, where one place is not enough.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    and_also: tuple[str, str] | None = None

    @property
    def changes(self) -> list[tuple[str, str]]:
        """(old, new) of each place."""
        return [(self.old, self.new), *([self.and_also] if self.and_also else [])]


STEP, SESSION = "tests/dptune/test_step.py", "tests/dptune/run/test_session.py"
NEIGHBOURS, AUTHORS = "tests/test_neighbours.py", "tests/test_author_neighbours.py"
TRAINER, ENGINE = "tests/dptune/integrations/test_trainer.py", "tests/dptune/integrations/test_engine.py"
TRAINER_PRIVACY = "tests/dptune/integrations/test_trainer_privacy.py"
TRAINER_RESUME = "tests/dptune/integrations/test_resume.py"
ON_DEVICE, PROGRAMS = "tests/pretend/test_steps.py", "tests/pretend/test_programs.py"
OPERATIONS = "tests/pretend/test_operations.py"
SHARDED = "tests/dptune/test_sharded_sum.py"
FLOAT16 = "tests/test_float16.py"
SHARDED_TRAINER = "tests/dptune/integrations/test_sharded_trainer.py"
BATCHES, LOOP = "tests/dptune/units/test_batches.py", "tests/utils/training/test_loop.py"

_ADD_NOISE, _DIVIDE = "        self._add_noise(noisy)\n", "        total /= self.config.divisor\n"

FAULTS = (
    Fault(
        "canaries: those that are out are learned too",
        "utils/training/canaries.py",
        "rows = _rows_of(canaries, canaries.included)",
        "rows = _rows_of(canaries, ~np.zeros_like(canaries.included))",
        ("tests/utils/training/test_canaries.py",),
        "the audit of a training judges guesses of coins that decide nothing",
    ),
    Fault(
        "canaries: a model with them may be published",
        "dptune/report/check.py",
        "    _require_no_canaries(folder)\n    statement",
        "    statement",
        ("tests/utils/training/test_canaries.py",),
        "a model that learned random text is published",
    ),
    Fault(
        "audit: the games that choose the threshold also judge",
        "dptune/audit/bounds.py",
        "found = _epsilons(judge, threshold, delta, alpha, says_in)",
        "found = _epsilons(choose, threshold, delta, alpha, says_in)",
        ("tests/dptune/audit/test_bounds.py",),
        "bounds on epsilon come out too high",
    ),
    # --- the step ---
    Fault(
        "noise scaled by 1/2",
        "dptune/noise.py",
        "mul_(std / grid)",
        "mul_(std / 2 / grid)",
        (STEP,),
        "the real epsilon is more than twice the reported one",
    ),
    Fault(
        "noise not scaled by the clip norm",
        "dptune/mechanism.py",
        "return self.gradient_noise_multiplier * (clip_norm or self.clip_norm) * (1 + ROUNDING) / sqrt(world_size)",
        "return self.gradient_noise_multiplier * (1 + ROUNDING) / sqrt(world_size)",
        (STEP, "tests/dptune/test_mechanism.py"),
        "with a clip norm above 1 the noise is too small",
    ),
    Fault(
        "noise skipped on one rank",
        "dptune/step.py",
        _ADD_NOISE,
        "        if self._ledger is not None:\n    " + _ADD_NOISE,
        (STEP,),
        "the sum has the noise of one rank only",
    ),
    Fault(
        "each rank's noise divided by the number of ranks",
        "dptune/mechanism.py",
        "/ sqrt(world_size)",
        "/ world_size",
        (STEP, "tests/dptune/test_mechanism.py"),
        "variances add up, standard deviations do not: too little noise on several ranks",
    ),
    Fault(
        "noise after the division",
        "dptune/step.py",
        _ADD_NOISE,
        "",
        (STEP,),
        "the noise is not divided with the sum: what is released is not what is documented",
        (_DIVIDE, _DIVIDE + _ADD_NOISE.replace("noisy", "total")),
    ),
    Fault(
        "noise after the ranks have met",
        "dptune/step.py",
        _ADD_NOISE,
        "",
        (STEP,),
        "each rank goes its own way, with the noise of one rank",
        (_DIVIDE, _ADD_NOISE.replace("noisy", "total") + _DIVIDE),
    ),
    Fault(
        "noise divided by the batch before it is added",
        "dptune/step.py",
        "std = self.config.noise_std_per_rank(self._sums.noises, self.clip_norm)",
        "std = self.config.noise_std_per_rank(self._sums.noises, self.clip_norm) / self.config.divisor",
        (STEP,),
        "the noise is too small by the batch size",
    ),
    Fault(
        "divisor is the drawn size",
        "dptune/step.py",
        _DIVIDE,
        "        total /= max(1, self._drawn)\n        self._drawn = 0\n",
        (STEP,),
        "the number drawn is private, and the division reveals it",
        (
            "        sums = self._begun()\n        try:\n",
            "        sums = self._begun()\n        self._drawn = getattr(self, '_drawn', 0) + len(norms)\n"
            "        try:\n",
        ),
    ),
    Fault(
        "gradients added up in float32",
        "dptune/step_sums.py",
        "torch.zeros(self.size, dtype=torch.float64, device=self._device)",
        "torch.zeros(self.size, dtype=torch.float32, device=self._device)",
        ("tests/test_fixed_shapes.py",),
        "one row less changes the rounding of all others by 0.1 C",
    ),
    Fault(
        "sharded: a rank's shards lack the noise",
        "dptune/step.py",
        _ADD_NOISE,
        "        if self._ledger is not None or self._sums.noises > 1:\n    " + _ADD_NOISE,
        (SHARDED + "::test_each_ranks_shards_have_the_whole_noise_once",),
        "most of the weights are released without noise",
    ),
    Fault(
        "sharded: each rank adds only its share of the noise",
        "dptune/sharded_sum.py",
        "    noises = 1\n",
        "    @property\n    def noises(self):\n        return self._ranks\n",
        (SHARDED + "::test_each_ranks_shards_have_the_whole_noise_once",),
        "shards are disjoint, so their noises do not add up: it is too small by the root of the number of ranks",
    ),
    Fault(
        "sharded: a shard is noised twice",
        "dptune/sharded_sum.py",
        "        return noisy.to(self._dtype)\n",
        "        return noisy.to(self._dtype) + torch.randn_like(noisy, dtype=self._dtype) * noisy.std()\n",
        (SHARDED + "::test_each_ranks_shards_have_the_whole_noise_once",),
        "the noise is not what the report says",
    ),
    Fault(
        "sharded: a rank does not wait for the ledger's line",
        "dptune/sharded_sum.py",
        "        if failed.item():\n",
        "        if False:\n",
        (SHARDED + "::test_no_rank_has_a_gradient_that_the_ledger_lacks",),
        "a rank uses a gradient that no ledger counts",
    ),
    Fault(
        "sharded: the ledger's line comes after the shards are used",
        "dptune/step.py",
        "        with sums.agreed():\n            self._record()\n",
        "        with sums.agreed():\n            pass\n",
        (SHARDED + "::test_no_rank_has_a_gradient_that_the_ledger_lacks",),
        "a crash between update and record loses a step from epsilon",
        (
            "            self._recorder.parameters[name].grad = mean\n",
            "            self._recorder.parameters[name].grad = mean\n        self._record()\n",
        ),
    ),
    Fault(
        "sharded: weights that were gathered before an update are used after it",
        "dptune/per_example/fixed_values.py",
        "        reshard(self._model)\n",
        "",
        (SHARDED + "::test_training_ends_with_the_weights_of_one_process",),
        "the model is trained with old embeddings",
    ),
    Fault(
        "sharded: a step that failed after its noise can be ended again",
        "dptune/step.py",
        "        self._is_spoiled = True  # until the step is recorded\n",
        "",
        (SHARDED + "::test_no_rank_has_a_gradient_that_the_ledger_lacks",),
        "the same sum is released with two noises",
    ),
    Fault(
        "sharded: a rank's rows get other rows' sums",
        "dptune/sharded_sum.py",
        "for of_rank in zip(*split, strict=True) for part in of_rank",
        "for of_name in split for part in of_name",
        (SHARDED + "::test_training_ends_with_the_weights_of_one_process",),
        "the model learns nothing, in private",
    ),
    Fault(
        "sharded: a sum that is sent in part may be tried again",
        "dptune/sharded_sum.py",
        "            if not self._sent:\n                raise\n",
        "            if True:\n                raise\n",
        (SHARDED + "::test_a_rank_that_ran_out_of_memory_is_tried_again_or_the_step_is_lost",),
        "some parameters count a micro-batch twice, beyond the clip norm",
    ),
    Fault(
        "sharded: a step whose sum was sent in part goes on",
        "dptune/step.py",
        "            self._is_spoiled = self._is_half_added = True\n",
        "            self._is_half_added = True\n",
        (SHARDED + "::test_a_rank_that_ran_out_of_memory_is_tried_again_or_the_step_is_lost",),
        "a gradient is released in which some parameters lack a micro-batch",
    ),
    Fault(
        "a step that begins with a failed micro-batch is not looked at",
        "dptune/step.py",
        "        if not self._is_looked_at:  # once per step\n",
        "        if not self._has_begun:  # once per step\n",
        (STEP,),
        "the optimizer gets a plain gradient beside the private ones",
    ),
    Fault(
        "sharded: a rank whose pass failed sends something",
        "dptune/sharded_sum.py",
        "self._send(parcel, torch.zeros(elements, dtype=self._dtype, device=self._computes_on))",
        "self._send(parcel, torch.ones(elements, dtype=self._dtype, device=self._computes_on))",
        ("tests/utils/training/test_in_step.py",),
        "a failure of memory, which the data may decide, shows in the gradient",
    ),
    Fault(
        "sharded: a check that only one rank fails",
        "dptune/per_example/check.py",
        "    return norms if mesh is None else norms_over_ranks(norms, mesh)\n",
        "    return norms\n",
        ("tests/dptune/per_example/test_check_sharded.py",),
        "the other ranks wait for ever",
    ),
    Fault(
        "sharded: a checkpoint's shards are not compared with their hashes",
        "dptune/run/checkpoint.py",
        "        files = {} if shards is None else shards.write(temporary)\n",
        "        files = {} if shards is None else {'shards/.metadata': shards.write(temporary)['shards/.metadata']}\n",
        ("tests/dptune/run/test_training_state.py",),
        "a damaged checkpoint is resumed",
    ),
    Fault(
        "sharded Trainer: the optimizer holds weights that were gathered",
        "dptune/integrations/trainer.py",
        "        reshard(self.model)  # a layer whose shards are gathered holds other tensors\n",
        "",
        (SHARDED_TRAINER + "::test_two_processes_with_shards_train_as_one_with_the_whole_model",),
        "embeddings never train, and epsilon is spent on them",
    ),
    Fault(
        "sharded Trainer: a process with fewer items makes fewer passes",
        "dptune/integrations/trainer.py",
        "        return [*batches, *[self._empty_batch] * missing]\n",
        "        return [*batches, *[self._empty_batch] * (missing // 2)]\n",
        (SHARDED_TRAINER + "::test_each_process_makes_as_many_passes_as_any",),
        "the other processes wait for ever",
    ),
    Fault(
        "sharded Trainer: a resumed run begins with its first weights",
        "dptune/integrations/sharded_trainer.py",
        "        put_back(self._resumed, self.model, self.optimizer)\n",
        "",
        (SHARDED_TRAINER + "::test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one",),
        "epsilon counts steps that the model lost",
    ),
    Fault(
        "what was fed is not compared with the draw",
        "dptune/step.py",
        "        self._fed.require_draw(self._device)\n",
        "",
        ("tests/dptune/test_step_draws.py",),
        "a loop that feeds the same row in every step gets the epsilon of Poisson draws",
    ),
    Fault(
        "a step without a sampler passes for Poisson",
        "dptune/step.py",
        "sampler=self._fed.sampler_name,",
        "",
        ("tests/dptune/test_step_draws.py",),
        "the report states an epsilon for batches that nobody drew",
    ),
    Fault(
        "a step may use any draw",
        "dptune/sampling.py",
        "drawn, wanted = self._unused[0]",
        "drawn, wanted = self._unused[-1]",
        ("tests/dptune/test_step_draws.py",),
        "a loop that skips draws until one pleases it is no Poisson sampling, but its report says that it is",
    ),
    Fault(
        "a rank beyond the others needs no ledger",
        "dptune/step.py",
        "        if rank not in range(world_size):\n",
        "        if rank < 0:\n",
        ("tests/dptune/test_step.py",),
        "a gradient is released without a line in the ledger",
    ),
    Fault(
        "fixed noise is not in the ledger",
        "dptune/step.py",
        "                noise_key=self._fed.noise_key,\n",
        "",
        ("tests/dptune/test_step_draws.py",),
        "the next launch of a loop states an epsilon over steps whose noise anyone can subtract",
    ),
    Fault(
        "each rank knows of its own fixed noise only",
        "dptune/fed_items.py",
        "self._noise_key = FIXED if fixed_keys else SECRET",
        "self._noise_key = self._own_key",
        ("tests/dptune/test_fed_items.py", "tests/dptune/test_step_draws.py"),
        "the sum has less noise than the report says",
    ),
    Fault(
        "fixed noise in the ledger is no reason",
        "dptune/ledger.py",
        "return (*_reasons_of_noise(self._noise_keys), *_reasons_of_samplers(self._samplers))",
        "return _reasons_of_samplers(self._samplers)",
        ("tests/dptune/test_ledger.py", "tests/dptune/test_budget.py"),
        "statement and budget state an epsilon over steps whose noise anyone can subtract",
    ),
    Fault(
        "the budget ignores what a ledger's lines say",
        "dptune/budget.py",
        "return self._opened(stage).reasons",
        "return []",
        ("tests/dptune/test_budget.py",),
        "several stages have an epsilon together though one of them guarantees nothing",
    ),
    Fault(
        "an epsilon for a ledger that guarantees nothing",
        "dptune/ledger.py",
        "return math.inf if self.reasons else self.cost(delta).epsilon",
        "return self.cost(delta).epsilon",
        ("tests/dptune/test_ledger.py",),
        "a loop prints an epsilon for batches that nobody drew",
    ),
    Fault(
        "draws under a fixed key pass for secret",
        "dptune/sampling.py",
        "return SAMPLER if self.keystream.secret else FIXED_KEY",
        "return SAMPLER",
        ("tests/dptune/test_step_draws.py",),
        "anyone can tell who was drawn, and amplification by sampling is lost",
    ),
    Fault(
        "rows that only fill up count",
        "dptune/step.py",
        "            factors = {name: own * counts for name, own in factors.items()}\n",
        "",
        ("tests/dptune/test_step_draws.py",),
        "rows that nobody drew are added",
    ),
    Fault(
        "a sampler of any settings passes for the configuration's",
        "dptune/step.py",
        "            config.require_sampler(sampler)\n",
        "            pass\n",
        ("tests/dptune/test_step_draws.py",),
        "the stated epsilon is that of another sampling probability",
    ),
    Fault(
        "a plan may contradict its mechanism",
        "dptune/run/plan.py",
        "if value != (accounted := getattr(self.privacy, name)):",
        "if not (accounted := getattr(self.privacy, name)):",
        ("tests/dptune/run/test_plan.py",),
        "a run draws larger batches than epsilon is computed for, or the report names a larger unit",
    ),
    Fault(
        "the run's step has no sampler",
        "dptune/run/session.py",
        "            sampler=self._poisson(),\n",
        "",
        ("tests/dptune/run/test_session.py",),
        "no front door shows its draws",
    ),
    Fault(
        "a Trainer's micro-batches are as wide as their widest item",
        "dptune/integrations/trainer.py",
        "        if self.privacy_args.disable_dp:\n            return LeastBatches",
        "        if True:\n            return LeastBatches",
        (TRAINER,),
        "an item's rounding follows its neighbours",
    ),
    Fault(
        "items that fill up a Trainer's micro-batch decide its width",
        "dptune/integrations/filling.py",
        "shape.items + 1 - len(items)",
        "shape.items - len(items)",
        ("tests/dptune/integrations/test_filling.py",),
        "a full micro-batch is as wide as its widest item",
        ("return value[: wanted - rows]", "return value"),
    ),
    Fault(
        "rows with padding share micro-batches with rows without",
        "dptune/shapes.py",
        'side="right" if self.masked else "left"',
        'side="left"',
        ("tests/dptune/test_shapes.py", "tests/dptune/integrations/test_filling.py"),
        "other kernels run if nobody in the draw has padding",
    ),
    Fault(
        "rows compared in evaluation mode only",
        "dptune/per_example/check.py",
        "    for training in (False, True):\n",
        "    for training in (False,):\n",
        ("tests/dptune/per_example/test_check.py",),
        "hand-written batch normalisation: one row moved the sum by 5.9 C",
    ),
    Fault(
        "layers are skipped for all rows at once",
        "dptune/per_example/check.py",
        "    _refuse_shared_randomness(model)\n",
        "",
        ("tests/dptune/per_example/test_check.py",),
        "which rows share a random number depends on who is drawn",
    ),
    Fault(
        "a data set's random numbers follow the public seed",
        "dptune/integrations/draws.py",
        "draw()\n            forget_randomness()  # for the data set and the collator\n",
        "draw()\n",
        ("tests/dptune/integrations/test_draws.py",),
        "one row less changes the crops of all later ones: 8.5 C, for anyone who knows the seed",
    ),
    Fault(
        "workers' random numbers follow the public seed",
        "dptune/integrations/draws.py",
        "torch.Generator().manual_seed(secret_seed())",
        "torch.default_generator",
        ("tests/dptune/integrations/test_draws.py",),
        "one row less changes the crops of all later ones, for anyone who knows the seed",
    ),
    Fault(
        "only torch gets a secret seed",
        "dptune/randomness.py",
        "    random.seed(seed)\n    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])\n",
        "",
        ("tests/dptune/test_randomness.py",),
        "augmentations that use numpy follow a public seed",
    ),
    Fault(
        "draws prefetched by an epoch that ended are kept",
        "dptune/integrations/draws.py",
        "        self._sampler._forget()\n        for _",
        "        for _",
        ("tests/dptune/integrations/test_draws.py",),
        "the next step is compared with a draw that nobody reads, and the run ends",
    ),
    Fault(
        "float32 by its parameters, bfloat16 in its products",
        "dptune/integrations/engine.py",
        "        if rounding.seen:\n",
        "        if False:\n",
        (ENGINE,),
        "an item's rounding follows its neighbours",
    ),
    Fault(
        "the callback forgets the caller's optimizer",
        "dptune/integrations/callback.py",
        "        self.engine.note_optimizer(optimizer)\n",
        "        pass\n",
        (ENGINE,),
        "another rate is ignored in silence when a run resumes",
    ),
    Fault(
        "one mask of several decides which items share a micro-batch",
        "dptune/integrations/filling.py",
        ", full=full)",
        ")",
        ("tests/dptune/integrations/test_filling.py",),
        "other kernels run if nobody in the draw has padding in the other list",
    ),
    Fault(
        "an adapter that was not run keeps what its columns held",
        "dptune/per_example/flat_gradients.py",
        "                self.values[:, columns] = 0\n",
        "                pass\n",
        ("tests/dptune/per_example/test_flat_gradients.py",),
        "whatever lay in that memory is added to the sum, unclipped",
    ),
    Fault(
        "a second use of an adapter overwrites the first",
        "dptune/per_example/flat_gradients.py",
        "if name in self.used:",
        "if False:",
        ("tests/dptune/per_example/test_flat_gradients.py",),
        "the gradient of a shared layer lacks a part",
    ),
    Fault(
        "an example whose norm overflows is added times 0",
        "dptune/per_example/flat_gradients.py",
        "            clear_rows(own, weights_B == 0)\n",
        "",
        ("tests/dptune/per_example/test_flat_gradients.py",),
        "0 times infinity is nan, and spoils the sum",
    ),
    Fault(
        "norms of adapters leave out what comes after whole blocks",
        "dptune/per_example/flat_gradients.py",
        "    if values_BN.shape[1] > whole:\n",
        "    if values_BN.shape[1] > whole and not whole:\n",
        ("tests/dptune/per_example/test_flat_gradients.py",),
        "the norm is too small, so the clipped gradient is too long",
    ),
    Fault(
        "an adapter's gradient without its scale",
        "dptune/lora.py",
        "grad_reduced = (grad @ B).mul_(ctx.adapter.scale)",
        "grad_reduced = grad @ B",
        ("tests/dptune/per_example/test_flat_gradients.py", "tests/dptune/test_lora.py"),
        "A learns at another rate than what is documented",
    ),
    Fault(
        "the callback takes a model of less than float32",
        "dptune/integrations/engine.py",
        "if rounds_by_shape(model, args):",
        "if False:",
        (ENGINE,),
        "an item's rounding follows its neighbours",
    ),
    Fault(
        "epsilon taken at the whole delta",
        "dptune/accounting/distributions.py",
        "left = delta - margin(spends, delta, sizes)",
        "left = delta",
        ("tests/dptune/accounting/test_distributions.py",),
        "rounding errors put the stated epsilon below the exact one at tiny deltas",
    ),
    Fault(
        "a micro-batch is as wide as its longest row",
        "dptune/units/batches.py",
        "self.data.batch(np.concatenate(chosen), pad_token_id, shape.width)",
        "self.data.batch(np.concatenate(chosen), pad_token_id, int(self.tokens[items].max()))",
        ("tests/test_fixed_shapes.py", "tests/dptune/units/test_batches.py"),
        "a row's rounding follows its neighbours' lengths",
        (
            "dummy = self.data.batch(np.array([], dtype=np.int64), pad_token_id, shape.width)",
            "dummy = self.data.batch(\n            np.array([], dtype=np.int64), pad_token_id, "
            "int(self.tokens[items].max()) if len(items) else 2\n        )",
        ),
    ),
    Fault(
        "a micro-batch has as many rows as were drawn",
        "dptune/shapes.py",
        "dealt.append((shape, [part[rank::ranks] for rank in range(ranks)]))",
        "dealt.append((Shape(-(-len(part) // ranks), shape.width), [part[rank::ranks] for rank in range(ranks)]))",
        ("tests/test_fixed_shapes.py",),
        "a row's rounding follows the number of its neighbours",
    ),
    Fault(
        "the output layer's chunks follow the number of labels",
        "dptune/losses.py",
        "size = _chunk_tokens(head.weight) if len(labels) > 1 else None",
        "size = None",
        ("tests/test_fixed_shapes.py",),
        "a row's rounding follows the labels of its neighbours",
    ),
    Fault(
        "an author is filled up to the largest in the draw",
        "dptune/units/batches.py",
        "np.log2(counts)).astype(np.int64), draw.most)",
        "np.log2(counts)).astype(np.int64), counts.max())",
        ("tests/dptune/units/test_batches.py",),
        "an author's rounding follows the other authors",
    ),
    Fault(
        "no margin for rounding",
        "dptune/mechanism.py",
        "* (1 + ROUNDING) / sqrt(world_size)",
        "/ sqrt(world_size)",
        ("tests/dptune/test_mechanism.py",),
        "sums of many rows move by more than C",
    ),
    Fault(
        "neighbouring coordinates share noise",
        "dptune/noise.py",
        "for values in self.parts():",
        "for values in ((part + part.roll(1)) / 2**0.5 for part in self.parts()):",
        (STEP, "tests/dptune/test_engine_claims.py"),
        "of the right variance, but half of it can be subtracted",
    ),
    Fault(
        "the noisy sum not rounded to the grid",
        "dptune/noise.py",
        "noisy.round_().mul_(grid)",
        "noisy.mul_(grid)",
        ("tests/dptune/test_last_bits.py",),
        "the last bits tell which sum the noise was added to",
    ),
    Fault(
        "noise added in float32",
        "dptune/noise.py",
        "own.copy_(noisy.round_().mul_(grid))",
        "own.copy_(own + (noisy - own.double() / grid).mul_(grid).float())",
        ("tests/dptune/test_last_bits.py",),
        "membership can be read off the values that float32 noise reaches",
    ),
    Fault(
        "ranks round to grids of their own",
        "dptune/step.py",
        "grid=self.config.grid(self.clip_norm)",
        "grid=self.config.grid(self.clip_norm) / self._world_size**2",
        ("tests/dptune/test_step.py",),
        "the sum's last bits tell how it was dealt out",
    ),
    Fault(
        "the tail of the noise cut off at 8.6 standard deviations",
        "dptune/noise.py",
        "if whole.min() < _SMALL:",
        "if False:",
        ("tests/dptune/test_noise.py",),
        "what a Gaussian reaches and the noise does not tells the sum",
    ),
    Fault(
        "two threads make noise from the same words",
        "dptune/noise.py",
        "    return 3 * (chunks",
        "    return 2 * (chunks",
        ("tests/dptune/test_noise.py",),
        "the difference of two coordinates has no noise",
    ),
    Fault(
        "products of two different tokens counted once",
        "dptune/per_example/uses.py",
        "            products[:, :, size:] *= 2\n",
        "            pass\n",
        ("tests/dptune/per_example/test_uses.py",),
        "norms of long examples are too small, so their gradients are too long",
    ),
    Fault(
        "a forked process draws its parent's noise",
        "dptune/noise.py",
        "        self.keystream.require_own_process()  # prepared values are the same in a forked process\n",
        "",
        ("tests/dptune/test_noise.py",),
        "the difference of the two releases has no noise",
    ),
    Fault(
        "a forked process draws its parent's words",
        "dptune/keystream.py",
        "if self.secret and os.getpid() != self._process:",
        "if False:",
        ("tests/dptune/test_noise.py",),
        "two processes draw the same batches or noise",
    ),
    Fault(
        "a step goes on after an error behind the sum",
        "dptune/step.py",
        "        self._is_spoiled = True  # until the count is added too\n",
        "",
        ("tests/dptune/test_step_scale_and_retry.py",),
        "the micro-batch that is tried again counts twice",
    ),
    Fault(
        "float16: the loss scale is not removed before clipping",
        "dptune/step.py",
        "_scaled(recorded.squared_norms(groups), self._loss_scale**-2)",
        "dict(recorded.squared_norms(groups))",
        (FLOAT16,),
        "every gradient is clipped to a 256th of the clip norm: the noise drowns it",
    ),
    Fault(
        "float16: what is summed keeps the loss scale",
        "dptune/step.py",
        "        factors = _scaled(factors, 1 / self._loss_scale)\n",
        "",
        (FLOAT16,),
        "an example adds 256 times the clip norm",
    ),
    Fault(
        "float16: a row that only fills up counts if it overflows",
        "dptune/step.py",
        "            norms = norms.where(counts, 0)  # also of a row that overflowed\n",
        "            norms = norms * counts\n",
        (FLOAT16,),
        "one example more changes the count of adaptive clipping twice as much as is noised",
    ),
    Fault(
        "float16: an example that overflows is added",
        "dptune/clipping.py",
        "    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)\n"
        "    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))\n",
        "    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)\n"
        "    return factors.nan_to_num(1.0)\n",
        (FLOAT16,),
        "one example spoils the sum, or adds without a bound",
    ),
    Fault(
        "float16: products of factors in float16",
        "dptune/per_example/uses.py",
        "    return factor.to(_exact_dtype(factor))\n",
        "    return factor\n",
        (FLOAT16,),
        "norms are too small, and clipped gradients too long",
    ),
    # --- clipping ---
    Fault(
        "factor without min(1, .)",
        "dptune/clipping.py",
        "clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)",
        "clamp_min(torch.finfo(norms_B.dtype).tiny))",
        ("tests/dptune/test_clipping.py",),
        "short gradients are stretched to C: results change, and zero gradients become huge",
    ),
    Fault(
        "norm of one layer only",
        "dptune/clipping.py",
        "return torch.stack(list(squared_norms.values())).sum(0).sqrt()",
        "return torch.stack(list(squared_norms.values()))[0].sqrt()",
        (NEIGHBOURS,),
        "other layers' gradients are not bounded",
    ),
    Fault(
        "squared norm taken for the norm",
        "dptune/clipping.py",
        "return torch.stack(list(squared_norms.values())).sum(0).sqrt()",
        "return torch.stack(list(squared_norms.values())).sum(0)",
        (NEIGHBOURS,),
        "gradients shorter than 1 are clipped too little",
    ),
    Fault(
        "each layer gets the whole clip norm",
        "dptune/clipping.py",
        "return dict.fromkeys(layers, 1 / sqrt(len(layers)))",
        "return dict.fromkeys(layers, 1.0)",
        ("tests/dptune/test_clipping_styles.py",),
        "K layers move the sum by C sqrt(K)",
    ),
    Fault(
        "sum before clipping",
        "dptune/step.py",
        "return self._add(recorded.folded(rows_per_unit), losses.detach(), rows_per_unit, items)",
        "return self._add(recorded.folded(len(losses)), losses.detach(), len(losses), items)",
        (NEIGHBOURS,),
        "a micro-batch is clipped as one example: sensitivity C holds, but for nobody's gradient",
    ),
    Fault(
        "rows of an author clipped one by one",
        "dptune/step.py",
        "return self._add(recorded.folded(rows_per_unit), losses.detach(), rows_per_unit, items)",
        "return self._add(recorded, losses.detach(), 1, items)",
        (AUTHORS,),
        "an author of k rows moves the sum by k C",
    ),
    Fault(
        "infinite gradients are kept",
        "dptune/clipping.py",
        "    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)\n"
        "    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))",
        "    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)\n"
        "    return factors.nan_to_num(1.0)",
        ("tests/dptune/test_clipping.py",),
        "one example with an overflow destroys the sum, which tells that it was drawn",
    ),
    Fault(
        "tied parameter's cross term left out",
        "dptune/per_example/uses.py",
        "found = found + 2 * ordinary.inner_products(lookup)",
        "found = found + ordinary.inner_products(lookup)",
        ("tests/dptune/per_example/test_recorded.py",),
        "a tied embedding's norm is too small, and what it clips too long",
    ),
    Fault(
        "private gradient clipped again",
        "utils/training/loop.py",
        "        optimizer.step()\n",
        "        nn.utils.clip_grad_norm_(parameters, 1.0)\n        optimizer.step()\n",
        (LOOP,),
        "no privacy is lost, but the update is no longer the noisy mean that is documented",
    ),
    # --- the ledger and accounting ---
    Fault(
        "ledger written after the gradient is released",
        "dptune/step.py",
        "        if self._ledger is not None:\n",
        "        if self._ledger is not None and False:\n",
        (STEP,),
        "a crash between update and record loses a step from epsilon",
        (
            "            self._recorder.parameters[name].grad = mean\n",
            "            self._recorder.parameters[name].grad = mean\n"
            "        if self._ledger is not None:\n"
            "            settings = {'sampling_probability': self.config.sampling_probability}\n"
            "            settings |= {'noise_multiplier': self.config.noise_multiplier}\n"
            "            self._ledger.record(clip_norm=self._last_clip_norm, **settings)\n",
        ),
    ),
    Fault(
        "ledger line skipped",
        "dptune/step.py",
        "        if self._ledger is not None:\n",
        "        if self._ledger is not None and self._ledger.steps % 7 != 1:\n",
        (STEP + "::test_steps_have_independent_noise_and_each_is_in_the_ledger",),
        "epsilon is of fewer steps than were released",
    ),
    Fault(
        "adaptive clipping's ledger has the wrong noise",
        "dptune/step.py",
        "noise_multiplier=self.config.noise_multiplier,",
        "noise_multiplier=self.config.gradient_noise_multiplier,",
        ("tests/dptune/test_clipping_styles.py::test_a_step_records_the_noise_that_is_accounted",),
        "the count's share of the budget is not accounted",
    ),
    Fault(
        "group size not recorded",
        "dptune/run/session.py",
        "self.ledger = Ledger(self.folder / LEDGER_NAME, group_size=self.plan.privacy.group_size)",
        "self.ledger = Ledger(self.folder / LEDGER_NAME)",
        (TRAINER_PRIVACY + "::test_a_group_size_is_in_ledger_report_and_epsilon",),
        "epsilon is that of one example, not of the whole unit",
    ),
    Fault(
        "group size ignored in accounting",
        "dptune/accounting/distributions.py",
        "one_step(one.noise_multiplier, one.sampling_probability, one.group_size, width)",
        "one_step(one.noise_multiplier, one.sampling_probability, 1, width)",
        ("tests/dptune/accounting/test_groups.py::test_larger_groups_cost_more_and_less_than_group_privacy",),
        "an author of k examples gets the epsilon of one",
    ),
    Fault(
        "group size ignored in the plan",
        "dptune/run/plan.py",
        "steps=steps, group_size=unit.group_size)",
        "steps=steps, group_size=1)",
        ("tests/dptune/run/test_plan.py",),
        "the noise is too small for the unit that is promised",
    ),
    Fault(
        "epsilon rounded down",
        "dptune/accounting/rounding.py",
        "quantize(Decimal(1).scaleb(-digits), ROUND_CEILING, _EXACT)",
        "quantize(Decimal(1).scaleb(-digits), 'ROUND_FLOOR', _EXACT)",
        ("tests/dptune/accounting/test_rounding.py",),
        "a bound that is printed is no bound",
    ),
    Fault(
        "noise multiplier rounded down",
        "dptune/accounting/__init__.py",
        "return math.ceil(value * 1e4 - 1e-6) / 1e4",
        "return math.floor(value * 1e4) / 1e4",
        (
            "tests/dptune/accounting/test_accounting.py::test_the_noise_found_keeps_its_promise_and_is_the_smallest_that_does",
        ),
        "the target epsilon is exceeded",
        ("group_size)], delta=delta) > target_epsilon:", "group_size)], delta=delta) > 2 * target_epsilon:"),
    ),
    Fault(
        "report of the planned steps",
        "dptune/report/statement.py",
        "epsilon=None if reasons else cost.epsilon,",
        "epsilon=None if reasons else config.planned_epsilon(),",
        ("tests/dptune/report/test_statement.py::test_steps_are_the_ledgers_with_the_repeated_ones_among_them",),
        "steps that ran twice after a crash are not in the reported epsilon",
    ),
    Fault(
        "report promises privacy under a fixed key",
        "dptune/report/statement.py",
        "    if not (noise.keystream.secret or FIXED in ledger.noise_keys):",
        "    if not noise.keystream:",
        ("tests/dptune/report/test_statement.py",),
        "anyone who knows the test seed can subtract the noise",
    ),
    Fault(
        "check before publishing believes the report",
        "dptune/report/check.py",
        "if not math.isclose(spent, epsilon, rel_tol=_SAME):",
        "if not math.isfinite(spent):",
        ("tests/dptune/report/test_check.py",),
        "a report with a smaller epsilon than the ledger's is uploaded",
    ),
    Fault(
        "check before publishing takes every file",
        "dptune/report/check.py",
        "if not (is_model_file(name) or any(",
        "if not (True or any(",
        ("tests/dptune/report/test_check.py",),
        "diagnostics that were put into the folder are uploaded",
    ),
    # --- randomness ---
    Fault(
        "sampler of a fixed size without replacement",
        "dptune/sampling.py",
        "drawn = np.concatenate(found)",
        "size = round(self.num_examples * self.sampling_probability)\n"
        "        drawn = np.sort(np.argsort(self.keystream.uniforms(self.num_examples))[:size])",
        ("tests/dptune/test_sampling.py::test_the_number_drawn_is_binomial_too_and_not_fixed",),
        "the accounting is for Poisson draws only",
    ),
    Fault(
        "draws repeat every epoch",
        "dptune/sampling.py",
        "drawn = np.concatenate(found)",
        "self._u = getattr(self, '_u', None) if hasattr(self, '_u') else self.keystream.uniforms(self.num_examples)\n"
        "        drawn = np.flatnonzero(self._u < self.sampling_probability)",
        ("tests/dptune/test_sampling.py::test_steps_are_independent_of_each_other",),
        "the same examples in every step: no amplification by sampling",
    ),
    Fault(
        "weights: epsilon of the average probability",
        "dptune/mechanism.py",
        "    return expected_batch_size / parts.effective_size",
        "    return expected_batch_size / num_examples",
        ("tests/dptune/test_mechanism.py", "tests/dptune/run/test_plan.py"),
        "rows of a large weight are drawn more often than epsilon is computed for",
    ),
    Fault(
        "weights: the smaller, the more often",
        "dptune/sampling.py",
        "self.sampling_probability * share",
        "self.sampling_probability / share",
        ("tests/dptune/test_sampling.py",),
        "rows of a small weight are drawn more often than epsilon is computed for",
    ),
    Fault(
        "weights: probabilities relative to the smallest weight",
        "dptune/sampling.py",
        "most = max(self.weights)",
        "most = min(self.weights)",
        ("tests/dptune/test_sampling.py", "tests/dptune/test_mechanism.py"),
        "the probability that is accounted is that of the rows drawn least often",
    ),
    Fault(
        "weights: a sampler with others passes for the configuration's",
        "dptune/mechanism.py",
        "        if sampler.parts != self.parts:\n",
        "        if sampler.parts is None and self.parts:\n",
        ("tests/dptune/test_mechanism.py",),
        "a loop draws other rows than its report says",
    ),
    Fault(
        "weights: not compared when a run resumes",
        "dptune/run/identity.py",
        "        **(plan.parts.identity if plan.parts else {}),\n",
        "",
        ("tests/dptune/run/test_identity.py",),
        "a resumed run draws by other weights than its report says",
    ),
    Fault(
        "same key twice",
        "dptune/keystream.py",
        "return cls(new_key(), secret=True)",
        "return cls(bytes(range(KEY_BYTES)), secret=True)",
        (SESSION + "::test_two_runs_differ_whatever_the_seeds",),
        "all runs share one noise, which can be subtracted",
    ),
    Fault(
        "ranks share one noise",
        "dptune/run/session.py",
        "            return GaussianNoise(size, device=device)\n",
        "            return GaussianNoise(size, Keystream.shared(self.ranks.from_main(new_key)), device=device)\n",
        (SESSION + "::test_ranks_share_their_draws_and_not_their_noise",),
        "equal noise on every rank does not add up to the variance that is accounted",
    ),
    Fault(
        "ranks draw different batches",
        "dptune/run/session.py",
        "return Keystream.shared(self.ranks.from_main(new_key))",
        "return Keystream.from_os()",
        (SESSION + "::test_ranks_share_their_draws_and_not_their_noise",),
        "an example can be in a step twice, once on each rank: sensitivity 2 C",
    ),
    Fault(
        "dropout masks not redrawn",
        "dptune/run/session.py",
        "        new_randomness(self.ranks.rank, number, test_seed=self.plan.test_seed)\n",
        "",
        (SESSION + "::test_dropouts_masks_are_drawn_before_each_step_and_forgotten_after",),
        "masks follow a public seed: removing an example shifts those of the examples behind it",
    ),
    Fault(
        "masks' seed kept in checkpoints",
        "dptune/run/session.py",
        "            forget_randomness()\n",
        "            pass\n",
        (SESSION + "::test_dropouts_masks_are_drawn_before_each_step_and_forgotten_after",),
        "a checkpoint tells the last step's masks",
    ),
    # --- the run ---
    Fault(
        "last step beyond the budget",
        "dptune/run/plan.py",
        "return min(plan.steps, max(completed, completed + affordable - recorded))",
        "return min(plan.steps, max(completed, completed + affordable - recorded) + 1)",
        ("tests/dptune/run/test_plan.py",),
        "a resumed run exceeds its target epsilon",
    ),
    Fault(
        "step beyond the last one is released",
        "dptune/run/session.py",
        "        if self.completed >= self.last:\n",
        "        if self.completed > self.last:\n",
        (SESSION + "::test_a_step_beyond_the_last_one_is_neither_begun_nor_released",),
        "a loop that counts wrongly exceeds the budget",
    ),
    Fault(
        "resumed ledger not checked",
        "dptune/run/session.py",
        "            self.ledger.require_continues(saved.ledger, saved.ledger_steps)\n",
        "            pass\n",
        (SESSION + "::test_a_folder_with_a_run_and_another_runs_checkpoint_are_refused",),
        "a ledger that lost lines understates epsilon",
    ),
    Fault(
        "identity not checked",
        "dptune/run/session.py",
        "            refuse_other_run(saved.identity, self.identity)\n",
        "            pass\n",
        (SESSION + "::test_a_folder_with_a_run_and_another_runs_checkpoint_are_refused",),
        "a resumed run has less noise than before",
    ),
    Fault(
        "existing run not refused",
        "dptune/run/session.py",
        "            refuse_existing_run(self.folder)\n",
        "            pass\n",
        (SESSION + "::test_a_folder_with_a_run_and_another_runs_checkpoint_are_refused",),
        "two runs in one ledger",
    ),
    Fault(
        "ranks not compared",
        "dptune/run/session.py",
        "            self.ranks.require_equal(self._parameters)\n",
        "            pass\n",
        (SESSION + "::test_ranks_are_compared_every_ten_steps",),
        "ranks that drifted apart train different models on one ledger",
    ),
    Fault(
        "adaptive clip norm forgotten on resume",
        "dptune/run/session.py",
        "        if self._mechanism:\n",
        "        if self._mechanism and self.completed < 0:\n",
        (TRAINER_PRIVACY + "::test_a_style_trains_and_is_resumed_with_its_clip_norm",),
        "a resumed run starts again from the first clip norm",
    ),
    Fault(
        "folder not locked by DPTrainer",
        "dptune/integrations/trainer.py",
        "            ranks.from_main(lambda: lock.make(Path(self.args.output_dir)))\n",
        "            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)\n",
        (TRAINER_PRIVACY + "::test_two_runs_do_not_share_a_folder",),
        "two runs write into one ledger",
    ),
    Fault(
        "folder unlocked before training ends",
        "utils/training/run.py",
        "    resumed = saved_run(folder.saved, folder.path)\n",
        "    folder.lock.release()\n    resumed = saved_run(folder.saved, folder.path)\n",
        (
            "tests/utils/training/test_run.py::test_the_folder_is_locked_and_the_settings_written_before_anything_is_trained",
        ),
        "a second launch writes into the same ledger",
    ),
    Fault(
        "folder of a training script never locked",
        "utils/training/run.py",
        "    ranks.from_main(lambda: folder.lock.make(folder.path))\n",
        "    folder.path.mkdir(parents=True, exist_ok=True)\n",
        (
            "tests/utils/training/test_run.py::test_the_folder_is_locked_and_the_settings_written_before_anything_is_trained",
        ),
        "two launches write into one ledger",
    ),
    Fault(
        "privacy state not saved with a Trainer's checkpoint",
        "dptune/integrations/state.py",
        "steps = run.ledger.steps\n",
        "steps = run.completed\n",
        ("tests/dptune/integrations/test_state.py",),
        "a checkpoint counts fewer steps than were released",
    ),
    # --- texts ---
    Fault(
        "pieces of a Unigram vocabulary that typed special tokens give",
        "utils/data/renamed_tokens.py",
        "[[names.get(piece, piece), score] for piece, score in vocabulary]",
        "[[piece, score] for piece, score in vocabulary]",
        ("tests/utils/data/test_renamed_tokens.py",),
        "`</s>` that a person typed ends their text",
    ),
    Fault(
        "special tokens that a normalizer makes of typed text",
        "utils/data/special_tokens.py",
        "if found is None or not self._all_written(one, *found):",
        "if found is None:",
        ("tests/utils/data/test_special_tokens.py",),
        "`</s>` in full-width letters ends a text",
    ),
    Fault(
        "special tokens that are left after encoding",
        "utils/data/text_only.py",
        "if self._special.count(ids) > most:",
        "if self._special.count(ids) > most + len(ids):",
        ("tests/utils/data/test_text_only.py",),
        "a tokenizer whose unknown words are end tokens ends texts anywhere",
    ),
    # --- rows ---
    Fault(
        "the last row of every chunk left out",
        "utils/data/encode_rows.py",
        "yield Chunk(chunk, kept, examples)",
        "yield Chunk(chunk[:-1] or chunk, kept, examples)",
        ("tests/utils/data/test_encode_rows.py",),
        "rows are dropped by their places among others, which a neighbour moves",
    ),
    Fault(
        "a file without the column of authors passes",
        "utils/data/sources.py",
        "if number == 1 and author_column is not None:",
        "if number == 1 and author_column is not None and False:",
        ("tests/utils/data/test_sources.py",),
        "each row of that file is an author of its own, and its people are protected row by row",
    ),
    Fault(
        "users are looked for in the first row alone",
        "utils/data/records.py",
        "if self._users_flag is not None:\n            refuse_unnoticed_users([row]",
        "if self._users_flag is not None and place.row == 1:\n            refuse_unnoticed_users([row]",
        ("tests/utils/data/test_load.py::test_users_that_nobody_thought_of_are_refused_in_the_training_file_alone",),
        "a file that names people is protected row by row without a word",
    ),
    Fault(
        "a file named twice is read twice",
        "utils/files/shards.py",
        "if path.resolve() in seen:",
        "if path.resolve() in ():",
        ("tests/utils/files/test_shards.py",),
        "each of its rows counts twice, and epsilon covers it once",
    ),
    Fault(
        "rows of other data used again",
        "utils/data/row_folder.py",
        "if self._key.get(name) != made_from.get(name)]",
        "if self._key.get(name) != made_from.get(name) and False]",
        ("tests/utils/data/test_row_folder.py",),
        "the report speaks of rows that nobody trained on",
    ),
    # --- units ---
    Fault(
        "author's rows beyond k",
        "dptune/units/batches.py",
        "return rows[np.sort(np.argsort(numbers(len(rows)))[:most])]",
        "return rows[np.sort(np.argsort(numbers(len(rows)))[: most + 1])]",
        (BATCHES + "::test_rows_beyond_k_are_left_out_and_up_to_k_all_stay",),
        "more of an author's rows enter a step than the report says",
    ),
    Fault(
        "author's rows always the first k",
        "dptune/units/batches.py",
        "return rows[np.sort(np.argsort(numbers(len(rows)))[:most])]",
        "return rows[:most]",
        (BATCHES + "::test_rows_beyond_k_are_left_out_and_up_to_k_all_stay",),
        "rows are not chosen afresh, as the report says",
    ),
    Fault(
        "author's weights ignored",
        "dptune/units/batches.py",
        "shares = 1 / np.maximum(counts, 1) if mean else np.ones(len(counts))",
        "shares = np.ones(len(counts))",
        (BATCHES + "::test_a_batch_of_authors_is_filled_up_with_rows_that_teach_nothing",),
        "the sum of an author's gradients is trained on instead of their mean",
    ),
    Fault(
        "more examples kept of an author than accounted",
        "dptune/units/authors.py",
        "_positions(of_row) < most",
        "_positions(of_row) <= most",
        ("tests/dptune/units/test_unit.py",),
        "the group is larger than its epsilon says",
    ),
    Fault(
        "rows per unit not announced to the step by DPTrainer",
        "dptune/integrations/trainer.py",
        "seen = run.backward(losses, rows_per_unit=rows_per_unit, items=items).losses",
        "seen = run.backward(losses, items=items).losses",
        (TRAINER + "::test_rows_of_one_unit_are_clipped_together",),
        "an item of several rows moves the sum by more than C",
    ),
    Fault(
        "people under two names: invisible characters",
        "dptune/units/names.py",
        "unicodedata.category(one) not in _NOT_SEEN",
        "True",
        ("tests/dptune/units/test_names.py",),
        "a person with a zero-width space in some rows counts as two, and the person is protected less than stated",
    ),
    Fault(
        "people under two names: signs of numbers",
        "dptune/units/names.py",
        "number = name.translate(_SIGNS)",
        "number = name",
        ("tests/dptune/units/test_names.py",),
        "-5 with a Unicode minus is another person than -5",
    ),
    # --- the loops ---
    Fault(
        "begin_step not called by the training loop",
        "utils/training/loop.py",
        "                run.begin_step()\n",
        "",
        (LOOP + "::test_the_order_of_a_run",),
        "no fresh masks, ranks never compared",
    ),
    Fault(
        "draw made once by the training loop",
        "utils/training/loop.py",
        "                draw = draws.draw()\n",
        "                draw = draw if run.completed > 0 else draws.draw()\n",
        (LOOP + "::test_every_step_has_a_draw_of_its_own",),
        "every step trains on the same batch",
    ),
    Fault(
        "empty draw skipped by the training loop",
        "utils/training/loop.py",
        "                draw = draws.draw()\n",
        "                draw = draws.draw()\n"
        "                if not len(draw):\n"
        "                    run.completed += 1\n"
        "                    continue\n",
        (LOOP + "::test_a_draw_without_any_row_is_a_step_and_a_line_of_the_ledger",),
        "a step without an update tells that nobody was drawn",
    ),
    Fault(
        "empty draw replaced by another in the training loop",
        "utils/training/loop.py",
        "                draw = draws.draw()\n",
        "                draw = next(filter(len, map(lambda _: draws.draw(), range(99))))\n",
        (LOOP + "::test_a_draw_without_any_row_is_a_step_and_a_line_of_the_ledger",),
        "the draws are no longer Poisson, and epsilon is of other draws",
    ),
    Fault(
        "step finished after a stop",
        "utils/training/loop.py",
        "                if seen is None:\n",
        "                if seen is None:\n                    run.finish_step()\n",
        (LOOP + "::test_a_stop_in_the_middle_releases_nothing_of_the_step_and_saves_the_one_before",),
        "part of a batch is released and the resumed run repeats it",
    ),
    Fault(
        "a batch made ahead is used for other rows",
        "utils/training/prefetch.py",
        "if begun is not None and begun[0] == key:",
        "if begun is not None:",
        ("tests/utils/training/test_prefetch.py", "tests/utils/training/test_micro_batches.py"),
        "after memory ran out some rows count twice and others never, under the numbers of others",
    ),
    Fault(
        "what did not fit in memory is put off for good",
        "utils/training/micro_batches.py",
        "        return _only(draw, left)\n",
        "        return _only(draw, left[:0])\n",
        ("tests/utils/training/test_in_step.py::test_memory_may_run_out_at_every_place_of_one_rank[sharded]",),
        "with sharded weights, rows that met a full memory are never trained on",
    ),
    Fault(
        "a rehearsal uses up the seeded random numbers",
        "utils/training/rehearsal.py",
        "fixed_randomness(self.accelerator.device), ",
        "",
        ("tests/utils/training/test_rehearsal.py::test_nothing_is_left_of_it",),
        "the state of the generators tells whether and how much was rehearsed",
    ),
    Fault(
        "each rank settles on a budget alone",
        "utils/training/rehearsal.py",
        "            if not all(gather_object([self._fits_here(size)])):\n",
        "            if not self._fits_here(size):\n",
        ("tests/utils/training/test_rehearsal.py::test_all_ranks_settle_on_what_fits_on_the_smallest[1]",),
        "ranks cut the same draw into micro-batches of different shapes",
    ),
    Fault(
        "sharded layers in 8 bits pick columns by outliers",
        "utils/models/quantized_shards.py",
        "state.threshold, state.has_fp16_weights, state.is_training = 0.0,",
        "state.threshold, state.has_fp16_weights, state.is_training = 6.0,",
        ("tests/utils/models/test_quantized_shards.py",),
        "one example changes the rounding, and the gradient, of another",
    ),
    Fault(
        "a request during the last micro-batch is not shared",
        "utils/training/shared_stop.py",
        "        return self._ended() or before\n",
        "        self._ended()\n        return before\n",
        ("tests/utils/training/test_shared_stop.py", "tests/utils/training/test_micro_batches.py"),
        "the step is finished although a rank was asked to stop",
    ),
    Fault(
        "each rank stops by itself",
        "utils/training/shared_stop.py",
        "        known = self._ended()\n        if not known:\n",
        "        known = self._ended() or asked\n        if not known:\n",
        ("tests/utils/training/test_shared_stop.py",),
        "the other ranks wait for it until the launch fails",
    ),
    Fault(
        "begin_step not called by DPTrainer",
        "dptune/integrations/trainer.py",
        "        run.begin_step()\n",
        "",
        (TRAINER + "::test_dropouts_masks_are_secret_though_the_trainers_seed_is_not",),
        "no fresh masks, ranks never compared",
    ),
    Fault(
        "begin_step not called by the callback",
        "dptune/integrations/callback.py",
        "        self.engine.begin_step()\n",
        "        pass\n",
        ("tests/dptune/integrations/test_callback.py",),
        "no fresh masks, ranks never compared",
    ),
    Fault(
        "micro-batches of one step not counted",
        "dptune/integrations/engine.py",
        "        if self._collected != self._parts:\n",
        "        if self._collected > self._parts:\n",
        (ENGINE + "::test_a_step_of_fewer_micro_batches_than_its_draw_has_is_not_released",),
        "a Trainer that cuts a step short releases part of a draw",
    ),
    Fault(
        "scaled loss not noticed by the callback",
        "dptune/integrations/engine.py",
        "        if scales != [1.0]:\n",
        "        if not scales:\n",
        (ENGINE + "::test_a_loss_that_is_multiplied_is_refused",),
        "gradients of another scale than the clip norm was chosen for",
    ),
    Fault(
        "a gamma of nearly 0",
        "dptune/clipping_styles.py",
        '        require_within("gamma", self.gamma, _GAMMAS)\n',
        '        require_positive("gamma", self.gamma)\n',
        ("tests/dptune/test_clipping_styles.py",),
        "a gradient of zeros is divided by zero, and the released sum is NaN: its row is there",
    ),
    Fault(
        "a group's divergence without its largest draw",
        "dptune/accounting/groups.py",
        "sigma, counts = noise_multiplier, np.arange(group_size + 1.0)",
        "sigma, counts = noise_multiplier, np.arange(group_size + 0.0)",
        ("tests/dptune/accounting/test_groups.py", "tests/dptune/accounting/test_bounds.py"),
        "epsilon of a person with k rows is too small at tiny deltas",
    ),
    # --- whose privacy ---
    Fault(
        "people not noticed by nlg_reddit",
        "scripts/nlg_reddit/fine_tune.py",
        "        users_flag=users_flag,\n",
        "",
        ("tests/scripts/test_nlg_reddit.py::test_a_mistake_is_one_line",),
        "a person with many texts is protected as if they had one",
    ),
    Fault(
        "people not noticed by DPTrainer",
        "dptune/integrations/trainer.py",
        "protected = None if privacy_args.disable_dp else train_dataset",
        "protected = None",
        ("tests/dptune/integrations/test_trainer_privacy.py",),
        "the same for a Trainer",
    ),
    # --- checks before training ---
    Fault(
        "neighbours not checked by train_clm.py",
        "utils/training/causal_lm.py",
        "        if self.plan.privacy is not None:\n            self._check_neighbours(model)\n",
        "",
        ("tests/utils/training/test_causal_lm.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "a model in which rows reach each other trains under a bound that does not hold",
    ),
    Fault(
        "neighbours not checked by train_classifier.py",
        "utils/classification/setup.py",
        "        check_classifier_rules(model, token_types=types, max_length=longest, **kinds)\n",
        "        pass\n",
        ("tests/utils/classification/test_setup.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "the same for classifiers",
    ),
    Fault(
        "neighbours not checked by nlg_reddit",
        "dptune/integrations/trainer.py",
        "        self._trainer._check_rules()\n",
        "",
        ("tests/scripts/test_nlg_reddit.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "the same for the conversations' script, which trains with a Trainer",
    ),
    Fault(
        "neighbours checked at a short length by train_clm.py",
        "utils/training/causal_lm.py",
        "width = CausalLMLoss(model), self._loss_scale, self.groups.data.block_size",
        "width = CausalLMLoss(model), self._loss_scale, min(self.groups.data.block_size, self.token_budget // 2)",
        ("tests/utils/training/test_causal_lm.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "what switches at a longer row is not found",
    ),
    Fault(
        "neighbours checked at a short length by train_classifier.py",
        "utils/classification/setup.py",
        "longest, types = settings.checkpoint.block_size,",
        "longest, types = 8,",
        ("tests/utils/classification/test_setup.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "the same for classifiers",
    ),
    Fault(
        "neighbours checked at a short length by nlg_reddit",
        "scripts/nlg_reddit/fine_tune.py",
        "max_length=length, card=card)",
        "max_length=16, card=card)",
        ("tests/scripts/test_nlg_reddit.py::test_rows_that_reach_each_other_are_refused_before_a_private_run",),
        "the same for the conversations' script",
    ),
    Fault(
        "neighbours not checked by DPTrainer",
        "dptune/integrations/trainer.py",
        "        self._trainer._check_rules()\n",
        "",
        ("tests/dptune/integrations/test_items.py::test_the_model_alone_decides_whether_it_is_refused",),
        "the same for a Trainer",
    ),
    Fault(
        "neighbours not checked by the callback",
        "dptune/integrations/engine.py",
        "        self._check_rules(train_dataloader.collate_fn)\n",
        "",
        ("tests/dptune/integrations/test_items.py::test_the_model_alone_decides_whether_it_is_refused",),
        "the same for the callback",
    ),
    Fault(
        "the check compares a row with itself only",
        "dptune/per_example/check.py",
        "one = [part[index : index + 1] for part in batch] if alone is None else alone(index)",
        "one = [part[index : index + 1] for part in batch]",
        ("tests/dptune/per_example/test_check.py", "tests/utils/models/test_trainable.py"),
        "what a row's padding does to it is not seen",
    ),
    Fault(
        "rows compared in training mode only",
        "dptune/per_example/check.py",
        "    for training in (False, True):\n",
        "    for training in (True,):\n",
        ("tests/dptune/per_example/test_check.py",),
        "a model whose rows reach each other when it is evaluated passes",
    ),
    Fault(
        "few other neighbours are tried",
        "dptune/per_example/check.py",
        "_OTHER_NEIGHBOURS = 4",
        "_OTHER_NEIGHBOURS = 3",
        ("tests/dptune/per_example/test_check.py",),
        "a row that reaches others is noticed less often",
    ),
    Fault(
        "rows around a switch not tried",
        "dptune/per_example/random_rows.py",
        "pairs = [(_SHORT, longest), (longest // 2, longest), *((at, at + 1) for at in sorted(switches))]",
        "pairs = [(_SHORT, longest), (longest // 2, longest)]",
        ("tests/dptune/per_example/test_random_rows.py",),
        "in bfloat16 only a row that just fits shows clearly that positions switch",
    ),
    Fault(
        "private items in the check",
        "dptune/integrations/items.py",
        "[random_item(make, row, vocabulary, rows=count) for row, count in pairs]",
        "[fetch(examples, [row.number % len(examples)])[0] for row, _ in pairs]",
        ("tests/dptune/integrations/test_items.py",),
        "one private item decides whether a model is refused, and rows behind it are not tried",
    ),
    Fault(
        "items beyond the bound not refused",
        "dptune/integrations/items.py",
        "            if (length := length_of(item, make)) > max_length:\n",
        "            if (length := length_of(item, make)) > 2 * max_length:\n",
        ("tests/dptune/integrations/test_items.py",),
        "rows of lengths that were never tried are trained on",
    ),
    Fault(
        "token types and positions beyond their tables not refused",
        "dptune/integrations/values.py",
        "            for name, limit in tables.items():\n",
        "            for name, limit in list(tables.items())[:1]:\n",
        ("tests/dptune/integrations/test_values.py",),
        "the run ends at the step that draws the item, which reveals that it was drawn",
    ),
    Fault(
        "items without tokens or with uneven lists not refused",
        "dptune/integrations/values.py",
        "            require_even(first, items, _beside(model) if labels else PER_TOKEN)\n",
        "",
        ("tests/dptune/integrations/test_values.py",),
        "the run ends at the step that draws the item, which reveals that it was drawn",
    ),
    Fault(
        "rows padded on the left found only by their step",
        "dptune/integrations/values.py",
        "                _require_plain(inputs, first, items, collate)\n",
        "                pass\n",
        ("tests/dptune/integrations/test_values.py",),
        "the run ends at the step that draws the item, which reveals that it was drawn",
    ),
    Fault(
        "a private item tells the model's classes",
        "dptune/integrations/values.py",
        "_outputs(model, _random_inputs(model, make, collate), given)",
        "_outputs(model, collate(items[:1]), given)",
        ("tests/dptune/integrations/test_values.py",),
        "one private item decides whether the run ends before it begins",
    ),
    Fault(
        "buffers not compared by the step",
        "dptune/step.py",
        "        self._fixed.require_unchanged()\n",
        "",
        ("tests/dptune/per_example/test_fixed_values.py",),
        "running statistics of the data are released without noise",
    ),
    Fault(
        "frozen weights not compared by the step",
        "dptune/step.py",
        "return name not in self._recorder.parameters and parameter.numel() <= SMALL",
        "return False",
        ("tests/dptune/per_example/test_fixed_values.py",),
        "running statistics of the data are released without noise",
    ),
    Fault(
        "weights not compared by the check",
        "dptune/per_example/check.py",
        "FixedValues(model, every)",
        "FixedValues(model)",
        ("tests/dptune/per_example/test_fixed_values.py",),
        "codebooks and momentum encoders of the data are released without noise",
    ),
    Fault(
        "only the size of a large tensor compared",
        "dptune/per_example/fixed_values.py",
        "    return _sums(bits)\n",
        "    return torch.empty(0)\n",
        ("tests/dptune/per_example/test_fixed_values.py",),
        "codebooks of the data are released without noise",
    ),
    Fault(
        "training mode not tried by the check",
        "dptune/per_example/check.py",
        "    trained = _losses_in_mode(model, losses, batch, training=True)\n    fixed.require_unchanged()\n",
        "    fixed.require_unchanged()\n    trained = _losses_in_mode(model, losses, batch, training=True)\n",
        ("tests/dptune/per_example/test_fixed_values.py",),
        "running statistics are found only after a step's gradients were computed",
    ),
    Fault(
        "rounding by the whole micro-batch not refused",
        "dptune/per_example/hooks.py",
        "        require_separate_rounding(model)\n",
        "",
        ("tests/dptune/per_example/test_quantized.py",),
        "one example's outliers change how others are rounded",
    ),
    Fault(
        "threshold of a stored 8-bit model kept",
        "utils/models/loading.py",
        "    round_rows_alone(model)\n",
        "",
        ("tests/utils/models/test_quantization.py::test_a_checkpoint_in_eight_bits_loses_its_own_threshold",),
        "its runs are refused, although only a setting is wrong",
    ),
    Fault(
        "max_grad_norm not refused",
        "dptune/integrations/checks.py",
        "        lambda value: value != 0,\n",
        "        lambda value: False,\n",
        ("tests/dptune/integrations/test_checks.py",),
        "transformers clips the noisy gradient again",
    ),
    # --- what only an accelerator shows ---
    Fault(
        "accelerator: the step's sum is made on the CPU",
        "dptune/step_sums.py",
        "torch.zeros(self.size, dtype=torch.float64, device=self._device)",
        "torch.zeros(self.size, dtype=torch.float64)",
        (ON_DEVICE,),
        "no step runs on an accelerator",
    ),
    Fault(
        "accelerator: the mask of examples that fill up is made on the CPU",
        "dptune/step.py",
        "torch.arange(len(norms), device=norms.device) < len(items)",
        "torch.arange(len(norms)) < len(items)",
        (PROGRAMS,),
        "a run on an accelerator fails at its first micro-batch that is filled up",
    ),
    Fault(
        "accelerator: noise stays on the CPU",
        "dptune/noise.py",
        "more.to(sum_P.device).mul_",
        "more.clone().mul_",
        (ON_DEVICE,),
        "no step on an accelerator can be finished",
    ),
    Fault(
        "accelerator: a value is read in each micro-batch",
        "dptune/step.py",
        "        norms = whole_norms(squared_norms)\n",
        "        norms = whole_norms(squared_norms)\n        norms.sum().item()\n",
        (OPERATIONS,),
        "the host waits for the device in each micro-batch",
    ),
    Fault(
        "accelerator: one more operation for each layer",
        "dptune/per_example/hooks.py",
        "rule(layer, input.detach(), grad)",
        "rule(layer, input.detach().clone(), grad)",
        (OPERATIONS,),
        "steps of small models are slower",
    ),
    Fault(
        "accelerator: a value is read for each tensor when the step ends",
        "dptune/step.py",
        "            self._recorder.parameters[name].grad = mean",
        "            self._recorder.parameters[name].grad = mean * float(mean.isfinite().all())",
        (OPERATIONS,),
        "the host waits for the device once per parameter",
    ),
    Fault(
        "accelerator: a value is read for each sharded sum",
        "dptune/sharded_sum.py",
        "        self._sent += 1\n",
        "        self._sent += 1\n        sent.sum().item()\n",
        (OPERATIONS,),
        "the host waits for the device once per large parameter and micro-batch",
    ),
    Fault(
        "a rehearsal holds no moments",
        "utils/training/rehearsal.py",
        "        yield held\n",
        "        del held\n        yield []\n",
        ("tests/utils/training/test_rehearsal.py",),
        "the budget that it finds does not fit beside the optimizer",
    ),
    Fault(
        "accelerator: its random numbers are not restored",
        "dptune/devices.py",
        "fork_rng(devices=[device], device_type=device.type)",
        "fork_rng(devices=[])",
        (ON_DEVICE, PROGRAMS),
        "generation and the check of the rules change what a program draws later",
    ),
    Fault(
        "accelerator: batches are not pinned",
        "dptune/units/batches.py",
        "return self._each(Tensor.pin_memory) if can_pin(device) else self",
        "return self",
        (BATCHES, PROGRAMS),
        "the host waits for the device before it can copy a batch",
    ),
    Fault(
        "accelerator: batches are waited for",
        "dptune/units/batches.py",
        "non_blocking=can_pin(device)",
        "non_blocking=False",
        (PROGRAMS,),
        "the host waits for the device whenever it copies a batch",
    ),
    Fault(
        "accelerator: no batch is made ahead",
        "utils/training/micro_batches.py",
        "with OneAhead(self._batch, background=computes_apart(self.accelerator.device)) as ahead:",
        "with OneAhead(self._batch, background=False) as ahead:",
        ("tests/utils/training/test_micro_batches.py",),
        "the device idles while the next batch is made",
    ),
    Fault(
        "accelerator: evaluation weighs tokens on the CPU",
        "utils/training/evaluation.py",
        "if len(rows) else [0], device=device, dtype",
        "if len(rows) else [0], dtype",
        (PROGRAMS,),
        "no run on an accelerator can be evaluated",
    ),
    Fault(
        "accelerator: checkpoints hold tensors of the device",
        "dptune/run/checkpoint.py",
        'map_location="cpu", weights_only=True',
        "weights_only=True",
        (PROGRAMS,),
        "a run cannot be resumed on another kind of device",
    ),
)


def copy_tree(target: Path) -> Path:
    """The working tree without what tests do not need."""
    return Path(shutil.copytree(ROOT, target, ignore=_IGNORED, symlinks=True))


def plant(fault: Fault, tree: Path) -> None:
    """Change a copy of the tree."""
    path = tree / fault.file
    text = path.read_text()
    for old, new in fault.changes:
        if (count := text.count(old)) != 1:
            raise SystemExit(f"{fault.name}: {old!r} occurs {count} times in {fault.file}; it must be there once")
        text = text.replace(old, new)
    path.write_text(text)


def is_caught(fault: Fault, tree: Path) -> bool:
    """Whether a test goes red. A test that hangs does not. An error of another kind, such as no such test, ends all."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *fault.tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if run.returncode not in (0, _TESTS_RED) or "error during collection" in run.stdout:
        raise SystemExit(f"{fault.name}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == _TESTS_RED


def main() -> None:
    """Plant each fault, run its tests and print a table; the exit status is 1 if one was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words, one of which a fault's name must contain")
    parser.add_argument("--output", type=Path, help="file for the table. Default: print it only")
    args = parser.parse_args()
    rows = ["| fault | place | caught | seconds |", "| --- | --- | --- | ---: |"]
    print(*rows, sep="\n", flush=True)
    missed = 0
    with TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        for fault in (one for one in FAULTS if any(word in one.name for word in args.only)):
            sound, began = (tree / fault.file).read_text(), time.monotonic()
            plant(fault, tree)
            caught = is_caught(fault, tree)
            (tree / fault.file).write_text(sound)
            missed += not caught
            verdict, seconds = "yes" if caught else "**MISSED**", time.monotonic() - began
            rows.append(f"| {fault.name} | `{fault.file}` | {verdict} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    print(f"{len(rows) - 2} faults, {missed} missed")
    if args.output:
        args.output.write_text("\n".join(rows) + "\n")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
