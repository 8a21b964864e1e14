"""Support for transformers' Trainer and for PEFT. `dptune.integrations.transformers` lists the public names."""
