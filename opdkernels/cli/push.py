"""push."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opdkernels.cli.options import Json, Quiet, command
from opdkernels.cli.output import emit
from opdkernels.config import PushOptions, validate_options


@command(PushOptions)
def push(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A patch, a file of masks, or the folder of a run.", show_default=False),
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub, org/name.", show_default=False)
    ],
    *,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Upload a patch, masks or a run of analyze, overlap or trajectory to the Hugging Face Hub, with a model card.

    Files of others in the repository stay as they are; a README gets one marked section. The access token is that of
    `hf auth login` or HF_TOKEN.

    Example: opdkernels push step-200.patch me/qwen-patch --base-model Qwen/Qwen2.5-0.5B --private
    """
    from opdkernels.hub import push_to_hub
    from opdkernels.hub.push import format_pushed

    validate_options(PushOptions, options)
    result = push_to_hub(path, repo_id, show_progress=not quiet, **options)
    emit(result, format_pushed(result), as_json=json, quiet=quiet)
