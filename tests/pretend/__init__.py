"""Tests on the pretend accelerator, each file in a process of its own; `tests/test_pretend_device.py` starts them."""
