"""Examples of a data set: prompts and what belongs to them, from files of JSON lines and from rows in memory."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkernels.errors import InputError, printable

PROMPT_FORMS = "a prompt is a text, or messages with role and content"
# first bytes of files that are no text, what they are, and how to get JSON lines
BINARY_FORMATS = (
    (b"\x1f\x8b", "compressed by gzip", "decompress it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it with unzstd"),
    (b"\xfd7zXZ\x00", "compressed by xz", "decompress it with unxz"),
    (b"BZh", "compressed by bzip2", "decompress it with bunzip2"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"PAR1", "a Parquet file", "convert it, for example with datasets.Dataset.from_parquet(FILE).to_json(OUT)"),
    (b"ARROW1", "an Arrow file", "convert it, for example with datasets.Dataset.from_file(FILE).to_json(OUT)"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch its content with git lfs pull"),
    (b"\xff\xfe", "UTF-16 or UTF-32 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)


@dataclass(frozen=True)
class Example:
    """One prompt and what belongs to it.

    Attributes:
        prompt: Text, or messages as chat templates take them.
        answer: Reference answer for the reward.
        teacher_id: Selects the teacher, if there are several.
        teacher_context: Text that only the self-teacher sees, before the prompt.
        images: Image files.
        completion: Completion of the data set, for off-policy steps.
        source: Where the example is from, such as a file and line; named in errors and not compared.
    """

    prompt: Any
    answer: str | None = None
    teacher_id: str = ""
    teacher_context: str | None = None
    images: tuple[str, ...] = ()
    completion: str | None = None
    source: str = field(default="", compare=False)


def describe(example: Example) -> str:
    """The source and the prompt of an example, for errors."""
    prompt = f"the prompt {printable(str(example.prompt))[:80]!r}"
    return f"{example.source}: {prompt}" if example.source else prompt


def read_examples(path: str) -> list[Example]:
    """The examples in a file of JSON lines. A byte order mark, blank lines and any line ends are accepted.

    Args:
        path: File in UTF-8. Paths of images in it are relative to its folder.

    Returns:
        One example per line that is not blank.

    Raises:
        InputError: The file cannot be read, or a line is not an example; names the line.
    """
    name, folder, text = printable(path), Path(path).parent, read_text(path)
    lines = [
        (f"{name} line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and line != "\ufeff"
    ]
    if not lines:
        raise InputError(f"{name} holds no prompt; give one JSON object with `prompt` per line")
    try:
        return [example_of(parse_line(line, source), source, folder) for source, line in lines]
    except InputError:
        if len(lines) > 1 and is_json(text):
            raise InputError(
                f"{name} is one JSON document over several lines; write one object per line, "
                f"for example with jq -c '{'.[]' if text.lstrip().startswith('[') else '.'}'"
            ) from None
        raise


def read_text(path: str) -> str:
    """The text of a file in UTF-8, without a byte order mark and with "\\n" as the only line end."""
    name = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe could be read once only, and a resumed run reads it again
            raise InputError(f"{name} cannot be read as JSON lines (not a regular file); give a file")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{name} does not exist; give JSON lines, or a task: addition, sums, reasoning_gym:NAME"
        ) from None
    except (OSError, ValueError) as error:  # a path with a NUL
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read as JSON lines ({printable(str(error))}); give a file") from None
    for prefix, content, remedy in BINARY_FORMATS:
        if data.startswith(prefix):
            raise InputError(f"{name} cannot be read as JSON lines (it is {content}); {remedy}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} line {number} is not UTF-8 ({printable(str(error))}); save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_json(text: str) -> bool:
    """Whether a text is one JSON document."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_line(line: str, source: str) -> Any:
    """The content of a line of JSON. `source` names the line in errors."""
    try:
        row = json.loads(line.removeprefix("\ufeff"), object_pairs_hook=unique_keys)  # files with a mark, concatenated
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = printable(error.object[error.start])
        raise InputError(f"{source} has an unpaired surrogate, {surrogate}, which is not Unicode text") from None
    except InputError as error:
        raise InputError(f"{source} {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON ({printable(str(error))})") from None
    return row


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of key and value pairs. Raises InputError for a key that occurs twice, of which one value is lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"has the key {printable(duplicate)!r} twice; keep one of them")
    return row


def example_of(row: Any, source: str, folder: Path) -> Example:
    """The example in a row of a data set: a dictionary with the fields of `Example`.

    Args:
        row: The row; other fields are ignored.
        source: Names the row in errors.
        folder: Folder that image paths are relative to.

    Raises:
        InputError: A field has the wrong type, or there is no prompt.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{source} holds {json_type(row)}; give one object with `prompt` per line")
    if "prompt" not in row:
        fields = f" (it has {printable(', '.join(map(str, row)))[:80]})" if row else ""
        raise InputError(f"{source} has no prompt{fields}; name a field `prompt`: {PROMPT_FORMS}")
    validate_prompt(row["prompt"], source)
    texts = {name: row.get(name) for name in ("answer", "teacher_id", "teacher_context", "completion")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{source} has {name} of type {type(value).__name__}; it takes text")
    images = [] if row.get("images") is None else row["images"]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError(f"{source} has images that are not a list of file names")
    return Example(
        prompt=row["prompt"],
        answer=texts["answer"],
        teacher_id=texts["teacher_id"] or "",
        teacher_context=texts["teacher_context"],
        images=tuple(os.fspath(folder / image) for image in images),
        completion=texts["completion"],
        source=source,
    )


def validate_prompt(prompt: Any, source: str) -> None:
    """Raises InputError for a prompt that is neither a text nor messages."""
    if not isinstance(prompt, (str, list)):
        raise InputError(f"{source} has a prompt that is {json_type(prompt)}; {PROMPT_FORMS}")
    if not prompt:
        raise InputError(f"{source} has an empty prompt; {PROMPT_FORMS}")
    for number, message in enumerate(prompt if isinstance(prompt, list) else (), 1):
        if not isinstance(message, Mapping):
            raise InputError(f"{source} has a prompt whose item {number} is {json_type(message)}; {PROMPT_FORMS}")
        if not isinstance(message.get("role"), str):
            raise InputError(f"{source} has a prompt whose message {number} has no text `role`; {PROMPT_FORMS}")
        content = message.get("content")
        is_parts = isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
        if not (isinstance(content, str) or is_parts or (content is None and message.get("tool_calls"))):
            raise InputError(
                f"{source} has a prompt whose message {number} has no `content` (a text, or a list of parts); "
                f"{PROMPT_FORMS}"
            )


def json_type(value: Any) -> str:
    """The JSON type of a value, with its article."""
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return "a number" if type(value) in (int, float) else names.get(type(value), f"of type {type(value).__name__}")
