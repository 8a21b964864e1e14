r"""Upload what a finished run may publish to the Hugging Face hub: the folder `publish` in it, and nothing else.

    python -m scripts.push OUT ann/my-adapter

Before anything is uploaded, the folder is verified (`python -m dptune.verify`): epsilon is computed again from the
ledger, report and card must agree with it, and a file that is not known to be publishable is refused. The repository is
private unless --public is given. The token is that of `hf auth login`, or the environment variable HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dptune._validate import refuse
from dptune.published import PUBLISH_NAME, published_part
from utils.cli.flags import exit_on_invalid_argument, parse

if TYPE_CHECKING:
    from dptune.report.statement import PrivacyStatement


@dataclass
class PushArguments:
    """What to upload, and where to."""

    _argument_group_name = "upload"

    run: str = field(
        metadata={"help": "folder of a finished run, its folder publish, or a merged model", "positional": True}
    )
    repository: str = field(metadata={"help": "repository on the hub: owner/name", "positional": True})
    public: bool = field(default=False, metadata={"help": "let everybody see the repository; by default it is private"})
    without_privacy: bool = field(
        default=False, metadata={"help": "upload a model that has no privacy guarantee, which may reveal its data"}
    )


GROUPS = (PushArguments,)


@exit_on_invalid_argument(*GROUPS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check the folder and upload it."""
    (given,) = parse(*GROUPS, args=argv, description=__doc__)
    folder = published_part(given.run)
    # torch: not while flags are parsed
    from dptune.report.check import check_publishable
    from dptune.report.statement import REPORT_NAME

    if not (folder / REPORT_NAME).is_file():
        remedy = "give the folder of a finished run, or of a model merged from one"
        refuse("RUN", given.run, f"holds no folder {PUBLISH_NAME}; {remedy}")
    statement = check_publishable(folder)
    if statement.epsilon is None and not given.without_privacy:
        remedy = f"the model has no guarantee ({statement.reasons[0]}); give the flag to upload it all the same"
        refuse("without_privacy", given.without_privacy, remedy)
    print(*describe_statement(statement), sep="\n")
    print(f"uploaded               {upload(folder, given.repository, public=given.public)}")


def describe_statement(statement: PrivacyStatement) -> list[str]:
    """Printable lines: what the check found."""
    from dptune.accounting.rounding import rounded_up

    if statement.epsilon is None:
        return ["privacy                NONE: " + "; ".join(statement.reasons)]
    return [
        f"checked                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}, from the ledger"
    ]


def upload(folder: Path, repository: str, *, public: bool) -> str:
    """Upload a folder as one commit, and return its address. The repository is made if it is missing.

    Raises:
        InvalidArgument: there is no token, the repository is public although `public` is not set, or the hub refuses
            or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        refuse("HF_TOKEN", None, "there is no token of the hub; run `hf auth login`, or set this variable")
    api = HfApi()
    try:
        api.create_repo(repo_id=repository, private=not public, exist_ok=True)
        is_private = api.model_info(repo_id=repository).private
    except Exception as error:  # the hub's client and the network raise unrelated types
        _refuse_upload(repository, error)
    if not (is_private or public):
        refuse("REPOSITORY", repository, "is public already; give --public, or another name")
    try:
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model trained with dptune"
        )
    except Exception as error:
        _refuse_upload(repository, error)
    return str(commit.commit_url)


def _refuse_upload(repository: str, error: Exception) -> NoReturn:
    """One line about what the hub's client raised."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    refuse("REPOSITORY", repository, f"nothing was uploaded ({type(error).__name__}: {reason[:200]})")


if __name__ == "__main__":
    main()
