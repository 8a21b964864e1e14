"""`python -m dptune.plan` is `dptune plan`: which settings suit a computing budget and an epsilon?"""

from __future__ import annotations

import sys

from dptune.command import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
