"""All faults. Nothing crashes with one and every output looks as before, so that only a test can tell."""

from __future__ import annotations

from tests.planted import accelerator, accounting, bands, gradients, noise, programs, run, sharded, step, trainer, views

FAULTS = (
    *step.FAULTS,
    *noise.FAULTS,
    *gradients.FAULTS,
    *sharded.FAULTS,
    *accounting.FAULTS,
    *bands.FAULTS,
    *views.FAULTS,
    *run.FAULTS,
    *trainer.FAULTS,
    *programs.FAULTS,
    *accelerator.FAULTS,
)
