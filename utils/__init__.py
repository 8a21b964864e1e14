"""Code that the programs share."""

import logging

# On some CPUs bitsandbytes warns, when transformers imports it, that a package for faster 4-bit sampling is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
