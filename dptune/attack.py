"""`python -m dptune.attack RUN` is `dptune attack RUN`: what can an attacker get from a trained model?"""

from __future__ import annotations

import sys

from dptune.command import main

if __name__ == "__main__":
    main(["attack", *sys.argv[1:]])
