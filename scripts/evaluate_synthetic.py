r"""Compare synthetic text with held-out real text, without anyone reading either.

    python -m scripts.evaluate_synthetic --synthetic_file dp.jsonl untrained.jsonl --names "epsilon 8" untrained \
        --held_out_file held_out.jsonl --train_file train.jsonl --output_dir OUT

writes `OUT/evaluation.html` (a page with tables and plots) and `OUT/evaluation.json`. They compare MAUVE on embeddings,
words, lengths, the accuracy on real text of small models trained on each file, and the overlap with the training rows.
Every number is shown beside that of other real text. After an interruption run the same line again to resume.

NOT PRIVATE: all results are computed on real rows, and no epsilon covers them. With --train_file, passages that look
memorised are quoted in `OUT/diagnostics_memorised.jsonl`, which must never be published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dptune.run.lock import FolderLock
from utils.cli.flags import exit_on_invalid_argument, parse, public_config
from utils.synthetic.arguments import ProxyArguments, StatisticsArguments, TextArguments

GROUPS = (TextArguments, StatisticsArguments, ProxyArguments)
FLAGS = {"dimensions": "--embedding_dimensions"}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare; `argv` is the command line, `sys.argv[1:]` if None."""
    texts, statistics, proxy = parse(*GROUPS, args=argv, description=__doc__)
    from utils.synthetic.parts import JSON_NAME, MEMORISED_NAME, PAGE_NAME, evaluate, write
    from utils.synthetic.texts import load_comparison

    comparison = load_comparison(texts)
    folder = Path(texts.output_dir)
    stages = 4 + (comparison.train is not None) + (proxy.settings(texts.seed) is not None)
    parts = []
    with FolderLock() as lock, tqdm(total=stages, unit="stage") as bar:
        lock.make(folder)
        for part in evaluate(folder, comparison, texts, statistics, proxy):
            parts.append(part)
            bar.update()
        write(folder, comparison, parts, public_config(texts, statistics, proxy))
        bar.update()
    print(f"wrote {folder / PAGE_NAME} and {JSON_NAME}: NOT PRIVATE, computed on real rows")
    if comparison.train is not None:
        print(f"{folder / MEMORISED_NAME}: quotes what looks memorised; must not be published")


if __name__ == "__main__":
    with exit_on_invalid_argument(*GROUPS, flags=FLAGS):
        main()
