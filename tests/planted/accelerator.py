"""What only an accelerator shows: no privacy is lost, but runs fail or are slow there."""

from __future__ import annotations

from tests.planted.fault import Fault
from tests.planted.paths import BATCHES, ON_DEVICE, OPERATIONS, PROGRAMS

FAULTS = (
    Fault(
        "accelerator: the step's sum is made on the CPU",
        "dptune/step_sums.py",
        "torch.zeros(self.size, dtype=torch.float64, device=self._device)",
        "torch.zeros(self.size, dtype=torch.float64)",
        (ON_DEVICE + "::test_a_sum_without_noise",),
        "no step runs on an accelerator",
    ),
    Fault(
        "accelerator: the mask of examples that fill up is made on the CPU",
        "dptune/step.py",
        "torch.arange(len(norms), device=norms.device) < len(items)",
        "torch.arange(len(norms)) < len(items)",
        (PROGRAMS + "::test_no_batch_is_waited_for",),
        "a run on an accelerator fails at its first micro-batch that is filled up",
    ),
    Fault(
        "accelerator: noise stays on the CPU",
        "dptune/noise.py",
        "more.to(sum_P.device).mul_",
        "more.clone().mul_",
        (ON_DEVICE + "::test_authors_of_several_rows",),
        "no step on an accelerator can be finished",
    ),
    Fault(
        "accelerator: a value is read in each micro-batch",
        "dptune/step.py",
        "        norms = whole_norms(squared_norms)\n",
        "        norms = whole_norms(squared_norms)\n        norms.sum().item()\n",
        (OPERATIONS + "::test_a_private_micro_batch_waits_seldom",),
        "the host waits for the device in each micro-batch",
    ),
    Fault(
        "accelerator: one more operation for each layer",
        "dptune/per_example/hooks.py",
        "rule(layer, input.detach(), grad)",
        "rule(layer, input.detach().clone(), grad)",
        (OPERATIONS + "::test_a_private_micro_batch_runs_few_more_operations",),
        "steps of small models are slower",
    ),
    Fault(
        "accelerator: a value is read for each tensor when the step ends",
        "dptune/step.py",
        "            self._recorder.parameters[name].grad = mean",
        "            self._recorder.parameters[name].grad = mean * float(mean.isfinite().all())",
        (OPERATIONS + "::test_the_end_of_a_step_is_short",),
        "the host waits for the device once per parameter",
    ),
    Fault(
        "accelerator: a value is read for each sharded sum",
        "dptune/sharded_sum.py",
        "        self._sent += 1\n",
        "        self._sent += 1\n        sent.sum().item()\n",
        (OPERATIONS + "::test_a_sharded_micro_batch_waits_no_more_often_and_adds_little_but_its_gathers",),
        "the host waits for the device once per large parameter and micro-batch",
    ),
    Fault(
        "accelerator: its random numbers are not restored",
        "dptune/devices.py",
        "fork_rng(devices=[device], device_type=device.type)",
        "fork_rng(devices=[])",
        (ON_DEVICE + "::test_the_check_leaves_the_devices_random_numbers",),
        "generation and the check of the rules change what a program draws later",
    ),
    Fault(
        "accelerator: batches are not pinned",
        "dptune/units/batches.py",
        "return self._each(Tensor.pin_memory) if can_pin(device) else self",
        "return self",
        (BATCHES + "::test_all_of_a_batch_is_pinned_where_copies_are_faster_from_there",),
        "the host waits for the device before it can copy a batch",
    ),
    Fault(
        "accelerator: batches are waited for",
        "dptune/units/batches.py",
        "non_blocking=can_pin(device)",
        "non_blocking=False",
        (PROGRAMS + "::test_no_batch_is_waited_for",),
        "the host waits for the device whenever it copies a batch",
    ),
    Fault(
        "accelerator: no batch is made ahead",
        "utils/training/micro_batches.py",
        "with OneAhead(self._batch, background=computes_apart(self.accelerator.device)) as ahead:",
        "with OneAhead(self._batch, background=False) as ahead:",
        ("tests/utils/training/test_micro_batches.py::test_the_next_batch_is_read_while_this_one_computes",),
        "the device idles while the next batch is made",
    ),
    Fault(
        "accelerator: evaluation weighs tokens on the CPU",
        "utils/training/evaluation.py",
        "if len(rows) else [0], device=device, dtype",
        "if len(rows) else [0], dtype",
        (PROGRAMS + "::test_the_held_out_loss_of_a_language_model",),
        "no run on an accelerator can be evaluated",
    ),
    Fault(
        "accelerator: checkpoints hold tensors of the device",
        "dptune/run/checkpoint.py",
        'map_location="cpu", weights_only=True',
        "weights_only=True",
        (PROGRAMS + "::test_a_run_trains_saves_and_resumes[private]",),
        "a run cannot be resumed on another kind of device",
    ),
)
