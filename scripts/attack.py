r"""Attack a trained model as an outsider would: what can be learned of its training rows?

    python -m scripts.attack OUT

OUT is the output folder of train_clm.py. The training rows and the held-out rows are those that its config.yaml names,
or those of --train_file and --held_out_file. The attacks are
- membership: was this row trained on? By the loss, by the loss compared with the start model, and by the least likely
  tokens; beside what epsilon allows;
- secrets that you planted in the training rows (--secrets): how many guesses find them;
- passages that the model's texts share with training rows.

OUT/attack gets `attack.html` (a page with tables and plots) and `attack.json`. The exit status is 1 if an attack
catches more than the stated epsilon allows. NOT PRIVATE: the results are made from training rows; do not publish them.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.attacks.arguments import AttackArguments
from utils.cli.flags import exit_on_invalid_argument, parse, public_config

GROUPS = (AttackArguments,)
FLAGS = {"validation_file": "--held_out_file"}


@exit_on_invalid_argument(*GROUPS, flags=FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Attack, write the results and print them; exits with status 1 if they contradict the stated epsilon."""
    (given,) = parse(*GROUPS, args=argv, description=__doc__)
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    from utils.attacks.perform import perform
    from utils.attacks.report import ATTACK_NOTICE, PAGE_NAME, printed, write_attack
    from utils.attacks.trained_run import find_rows, find_run
    from utils.cli.launch import make_accelerator

    run = find_run(
        given.run,
        model=given.model_name_or_path,
        train_file=given.train_file or (),
        held_out_file=given.held_out_file or (),
    )
    findings = perform(run, find_rows(run), given, make_accelerator().device)
    given.folder.mkdir(parents=True, exist_ok=True)
    write_attack(given.folder, findings, public_config(given))
    print(*printed(findings), sep="\n")
    print(f"written                {given.folder / PAGE_NAME}, attack.json\n{ATTACK_NOTICE}")
    if findings.contradictions():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
