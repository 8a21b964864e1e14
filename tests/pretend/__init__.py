"""Tests on the pretend accelerator, in a process of their own, which `tests/test_pretend_device.py` starts."""
