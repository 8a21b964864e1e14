"""Audits: evidence, from games that an adversary plays, that a stated epsilon holds or that it does not.

`python -m dptune.audit` runs them. `mechanism` plays games against the real engine on a stand-in model. `training`
judges the guesses about canary rows of one training (see docs/reviewers/audit.md).

An audit gives lower bounds on epsilon. A lower bound above the stated epsilon shows a fault. One below it shows no
fault, and proves nothing more.
"""
