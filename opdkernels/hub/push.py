"""`push_to_hub`: uploads a patch, masks or a run in one commit, with a card, and without touching files of the user."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.formatting import byte_size
from opdkernels.hub.card import merge_card
from opdkernels.hub.products import Product, product_of
from opdkernels.outputs import ANALYSIS, RUN_FILE, read_json_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
REMEDIES = {  # by HTTP status
    401: "log in with `hf auth login`, or give a valid token",
    403: "give a token that may write to this repository, or open a pull request with create_pr",
    404: "check the id and the revision, and that the token may see them",
    412: "the repository has changed in the meantime; push again",
}


def push_to_hub(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    repo_type: Literal["model", "dataset"] = "model",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Upload a patch, a file of masks or the folder of a run to the Hugging Face Hub, with a model card.

    One commit has the files and README.md. Only files that this package wrote are uploaded, and files in the repository
    that it did not write are never replaced: in an existing README.md the marked section of the product is replaced, or
    appended. Files that an earlier upload of a run left and that the new one does not have are deleted.

    Args:
        path: A patch, a file of masks, or the folder of a finished run of `analyze`, `overlap` or `trajectory`.
        repo_id: Repository, "org/name"; created if it does not exist.
        base_model: Id of the base model on the Hub, for the card.
        private: Whether a new repository is private; None: the default of its owner.
        token: Access token; None: HF_TOKEN, or that of `hf auth login`.
        revision: Branch to commit to, created if it does not exist; None: main.
        commit_message: Message of the commit; None: "Upload NAME with opdkernels".
        create_pr: Open a pull request instead of committing.
        repo_type: "model" or "dataset".
        show_progress: Whether huggingface_hub shows progress bars, as far as they are enabled.

    Returns:
        url (of the commit or the pull request), repo_id, kind, files (names in the repository), deleted, bytes.

    Raises:
        InputError: The path has nothing to upload, the repository has another file of the same name, or the Hub cannot
            be reached or refuses the upload.
        UsageError: An id is not valid, there is no token, or options do not fit together.

    Examples:
        opdkernels.push_to_hub("step-200.patch", "me/qwen-patch", base_model="Qwen/Qwen2.5-0.5B", private=True)
    """
    product = product_of(path)
    hub = import_hub()
    for name, value in (("repo_id", repo_id), ("base_model", base_model)):
        validate_id(name, value)
    if repo_type not in ("model", "dataset"):
        raise UsageError(f"repo_type is {printable(repr(repo_type))}; give model or dataset")
    if create_pr and revision is not None:
        raise UsageError("create_pr opens a pull request against main; leave out revision")
    api = hub.HfApi(token=token or hub.get_token())
    if not api.token:
        raise UsageError("there is no access token for the Hub; run `hf auth login`, set HF_TOKEN, or give token")
    name = Path(os.path.realpath(path)).name
    with one_line_errors(repo_id):
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        remote = RemoteRepo(api, repo_id, repo_type, revision)
        stale = remote.stale_files(product)
        readme = merge_card(remote.text(README), product, repo_id, base_model, repo_type)
        operations = [
            *(hub.CommitOperationAdd(target, os.fspath(local)) for target, local in product.files.items()),
            hub.CommitOperationAdd(README, readme.encode()),
            *(hub.CommitOperationDelete(target, is_folder=False) for target in stale),
        ]
        with library_output(show_progress):
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload {name} with opdkernels",
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                parent_commit=remote.sha,
            )
    return {
        "url": commit.pr_url or commit.commit_url,
        "repo_id": repo_id,
        "kind": product.kind,
        "files": [*product.files, README],
        "deleted": stale,
        "bytes": product.nbytes,
    }


def format_pushed(result: dict[str, Any]) -> list[str]:
    """The result of `push_to_hub` as lines of text."""
    files = result["files"]
    shown = ", ".join(map(printable, files[:6])) + (f" and {len(files) - 6} more" if len(files) > 6 else "")
    deleted = [f"deleted {', '.join(map(printable, result['deleted']))}"] if result["deleted"] else []
    return [f"uploaded {shown} ({byte_size(result['bytes'])})", *deleted, printable(result["url"])]


class RemoteRepo:
    """One revision of a repository: its files, and what they are."""

    def __init__(self, api: HfApi, repo_id: str, repo_type: str, revision: str | None):
        self.api, self.repo_id, self.repo_type = api, repo_id, repo_type
        info: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        self.sha = info.sha
        self.names = sorted(sibling.rfilename for sibling in info.siblings or ())

    def text(self, name: str) -> str | None:
        """The content of a text file; None if there is none."""
        if name not in self.names:
            return None
        local = self._download(name)
        try:
            return local.read_text("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name} of {self.repo_id} is not UTF-8; convert it, and push again") from None

    def stale_files(self, product: Product) -> list[str]:
        """Files of an earlier upload of the same kind that a product does not have.

        Raises InputError if the repository has files under names of the product that are not of its kind.
        """
        same = [name for name in self.names if name in product.files or product.owns(name)]
        if same and self._format(product) != product.format:
            raise InputError(
                f"{self.repo_id} has a file {printable(same[0])} that is not of {product.noun}; choose another "
                "repository, or rename one of the two files"
            )
        return [name for name in same if name not in product.files]

    def _format(self, product: Product) -> str | None:
        """The format of what the repository has in place of a product; None if it is not of this package."""
        name = product.format_file
        if name not in self.names:
            return None
        if name == RUN_FILE and product.format == ANALYSIS.format:
            return read_json_object(self._download(name)).get("format")
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            header = self.api.parse_safetensors_file_metadata(
                self.repo_id, name, repo_type=self.repo_type, revision=self.sha
            )
        except SafetensorsParsingError:
            return None
        return (header.metadata or {}).get("format")

    def _download(self, name: str) -> Path:
        return Path(self.api.hf_hub_download(self.repo_id, name, repo_type=self.repo_type, revision=self.sha))


def import_hub() -> Any:
    """The module huggingface_hub. Raises InputError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            "push_to_hub needs huggingface_hub, which is not installed; pip install opdkernels[hub]"
        ) from None
    return huggingface_hub


def validate_id(name: str, value: str | None) -> None:
    """Raises UsageError unless a value is an id of a repository or, for base_model, None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if value is None and name == "base_model":
        return
    try:
        validate_repo_id(value)  # type: ignore[arg-type]
    except HFValidationError:
        pass
    else:
        if value:
            return
    raise UsageError(f"{name} is {printable(repr(value))}; give an id of the Hub, such as org/name")


@contextlib.contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """Turns what the Hub, the network or its library raises into InputError with one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (InputError, UsageError):
        raise
    except OfflineModeIsEnabled:
        raise InputError(f"cannot push to {repo_id} in offline mode; unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = REMEDIES.get(status, "try again later") if status is not None else "try again later"
        raise InputError(f"cannot push to {repo_id} ({first_line([error.server_message, error])}); {remedy}") from error
    except Exception as error:  # network and disk: each has its own exception class
        text = f"{type(error).__name__}: {first_line([error])}"
        raise InputError(f"cannot push to {repo_id} ({text}); check the network") from error


def first_line(candidates: Iterable[object]) -> str:
    """The first line of the first text that is not empty, without control characters and not too long."""
    lines = (line.strip() for text in candidates if text for line in str(text).splitlines())
    return printable(next((line for line in lines if line), "no reason given"))[:200]


@contextlib.contextmanager
def library_output(show_progress: bool) -> Iterator[None]:
    """What huggingface_hub prints: no question whether Parquet files are meant to be in a model's repository."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not show_progress and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            yield
    finally:
        if hide:
            enable_progress_bars()
