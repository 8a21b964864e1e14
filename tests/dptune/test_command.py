"""The command `dptune`: its subcommands, its help, and mistakes. tests/test_packaging.py runs it from a wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dptune import command
from dptune.command import ROOT, SUBCOMMANDS, Program, main
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS, Groups

TRAIN = ["train", "--model_name_or_path", "m", "--output_dir", "o"]
HIDE = """
import sys
sys.modules.update(dict.fromkeys(("accelerate", "torch", "transformers")))  # as if they were not installed
from dptune.command import main
main(sys.argv[1:])
"""


def dptune(*words: str, code: tuple[str, ...] = ("-m", "dptune"), cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *code, *words]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_subcommands_that_are_there(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: dptune SUBCOMMAND [flags]"
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == [name for name, program in SUBCOMMANDS.items() if program.exists]
    assert {"train", "classify", "sample", "plan", "epsilon", "budget", "audit", "demo"} <= set(listed)
    assert all(program.does in "\n".join(lines) for program in SUBCOMMANDS.values() if program.exists)


@pytest.mark.parametrize("names", [("dptune.nothing_such",), ("scripts.nothing_such",), ("scripts/nothing_such.sh",)])
def test_a_program_that_is_not_there_is_not_listed(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.SUBCOMMANDS, "later", Program("do something", names))
    main(["--help"])
    assert "later" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["later"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["tran"], "unknown subcommand: tran (did you mean train?); dptune --help lists them"),
        (["xyz"], "unknown subcommand: xyz; dptune --help lists them"),
        (["demo", "--fast"], "dptune demo takes no flags: it is to fine-tune"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(f"error: {told}")
    assert printed.err.count("\n") == 1


def test_a_subcommand_shows_its_programs_help_and_needs_no_library_for_it(tmp_path: Path) -> None:
    for words, text in (
        (["train", "--help"], "--target_epsilon"),
        (["classify", "--help"], "--finetune_mode"),
        (["sample", "--help"], "--instruction_file"),
        (["sample", "--dataset_name", "pubmed_generation", "--num_processes", "2", "--help"], "--num_samples"),
        (["plan", "--help"], "--hours"),
        (["epsilon", "--help"], "--batch_size"),
        (["budget", "--help"], "budget_file"),
    ):
        run = dptune(*words, code=("-c", HIDE), cwd=tmp_path)
        assert (run.returncode, run.stderr) == (0, ""), words
        assert run.stdout.startswith("usage: "), words
        assert text in run.stdout, words


def test_a_missing_library_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    run = dptune(*TRAIN, "--noise_multiplier", "1", "--train_file", "x", code=("-c", HIDE), cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr == "error: dptune train needs torch: pip install 'dptune[scripts]'\n"


def test_the_path_of_the_current_folder_comes_after_the_programs(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("raise SystemExit('the wrong utils')")
    run = dptune("epsilon", "--num_examples", "1000", "--batch_size", "10", "--epochs", "1", cwd=tmp_path)
    assert run.stderr.startswith("error: one of the arguments --noise_multiplier --target_epsilon is required")
    run = dptune(*TRAIN, "--lora_rr", "1", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (
        2,
        "error: unknown flag: --lora_rr (did you mean --lora_r?) (--help lists the flags)\n",
    )


def test_a_program_that_moved_still_runs_and_says_where_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    """`dptune plan` printed the table of epsilon before it proposed settings."""
    with_space = ["--num_examples", "1000", "--batch_size", "10", "--epochs", "1", "--noise_multiplier", "1"]
    printed = []
    for words in (
        ["epsilon", *with_space],
        ["plan", *with_space],
        ["plan", "--batch_size=10", *with_space[:2], *with_space[4:]],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dptune", *words])
            patch.setattr(sys, "path", list(sys.path))
            main()
        printed.append(capsys.readouterr())
    assert [one.out for one in printed] == 3 * [printed[0].out]
    note = "note: dptune plan with --batch_size is now dptune epsilon\n"
    assert [one.err for one in printed] == ["", note, note]
    assert printed[0].out.startswith("epsilon at noise multiplier 1, ")
    for subcommand, (flag, other) in command.MOVED.items():
        assert {subcommand, other} <= SUBCOMMANDS.keys()
        assert flag.startswith("--")


def test_the_demo_runs_its_script_in_the_current_folder(tmp_path: Path) -> None:
    """With programs that only say where they were started and with what, since the real ones download a model."""
    (tmp_path / "scripts").mkdir()
    demo = (ROOT / "scripts" / "demo.sh").read_text().replace("-m accelerate.commands.launch", "")
    (tmp_path / "scripts" / "demo.sh").write_text(demo.replace('--config_file "$root/', '"$root/'))
    here = tmp_path / "here"
    here.mkdir()
    (here / "scripts").mkdir()
    (here / "scripts" / "prepare_demo.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "scripts" / "prepare_demo.py").write_text("import os; print('prepared in', os.getcwd())")
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / "accelerate_config_nofsdp.cfg").write_text(
        "import json, sys; print(json.dumps(sys.argv[1:])); sys.exit('train_clm' in sys.argv[1])"
    )
    code = f"import dptune.command as c; c.ROOT = c.Path({str(tmp_path)!r}); c.main(['demo'])"
    run = dptune(code=("-c", code), cwd=here)
    prepared, started = run.stdout.splitlines()
    program, *flags = json.loads(started)
    assert (prepared, program, run.returncode) == (f"prepared in {here}", str(tmp_path / "train_clm.py"), 1)
    training = Groups(*parse(*CAUSAL_LM_GROUPS, args=flags))
    assert training.privacy.ignore_users, "the chats name their users, so the training would be refused"
    assert training.card.base_model_name, "without it the verifier, at the end, refuses the path of the base model"
    assert '-m dptune.verify "$run"' in demo
