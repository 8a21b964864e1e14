"""What the programs share."""

import logging

# At its import, which transformers does wherever it is installed, bitsandbytes warns on some CPUs of a package that
# only makes 4-bit sampling faster: a line in every command, before our own.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
