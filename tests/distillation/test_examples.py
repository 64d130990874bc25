"""Files of prompts as people have them: each is read, or refused in one line that names the file and the line."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from opdkernels.distillation.examples import Example, read_examples
from opdkernels.distillation.rollout import encode
from opdkernels.distillation.text import TextProcessor, num_shared_ids
from opdkernels.errors import InputError
from tests.distillation.conftest import tokenizer

LINES = b'{"prompt": "1+1="}\n{"prompt": "2+2="}\n'
MESSAGES = [{"role": "user", "content": "1+1="}]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINES,
        b"\xef\xbb\xbf\n" + LINES,
        LINES.replace(b"\n", b"\n\xef\xbb\xbf"),  # files with a mark, concatenated
        LINES.replace(b"\n", b"\r\n") + b"\r\n\r\n",
        LINES.replace(b"\n", b"\r"),
        b"\n  \n\t\n" + LINES.replace(b"\n", b"\n\n \n"),
        LINES.rstrip(b"\n"),
        LINES.replace(b"{", b'  {"id": 3, "answer": null, "score": NaN, '),
        LINES.replace(b"{", '{"note": "é\u2028", '.encode()),
    ],
    ids=["mark", "mark on its own line", "marks", "CRLF", "CR", "blank lines", "no end", "more fields", "UTF-8"],
)
def test_files_as_people_have_them_are_read(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    examples = read_examples(str(tmp_path / "p.jsonl"))
    assert examples == [Example("1+1="), Example("2+2=")]
    assert all(example.source.startswith(f"{tmp_path}/p.jsonl line ") for example in examples)


ARRAY = json.dumps([{"prompt": "1+1="}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(LINES, mtime=0), r"p\.jsonl .*\(it is compressed by gzip\); decompress it"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"PAR1" + LINES, "a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (LINES.decode().encode("utf-16"), "UTF-16 .*save it as UTF-8"),
        (LINES + b'{"prompt": "caf\xe9"}', r"p\.jsonl line 3 is not UTF-8"),
        (ARRAY.encode(), r"p\.jsonl line 1 holds a list; give one object"),
        (json.dumps([{"prompt": "1"}], indent=1).encode(), r"p\.jsonl is one JSON document .*jq -c '\.\[\]'"),
        (json.dumps({"prompt": "1", "answer": "2"}, indent=1).encode(), r"is one JSON document .*jq -c '\.'"),
        (LINES + b'"3+3="', "line 3 holds a text"),
        (LINES + b"null", "line 3 holds null"),
        (LINES + b"prompt,answer\n", "line 3 is not JSON"),
        (LINES + b'{"prompt": "3"},', "line 3 is not JSON"),
        (LINES + b"\0\0\0", "line 3 is not JSON"),
        (LINES + b"{'prompt': '3'}", "line 3 is not JSON"),
        (LINES + b'{"prompt": "3", "answer": "1", "prompt": "4"}', "line 3 has the key 'prompt' twice"),
        (LINES + b'{"prompt": [{"role": "user", "role": "a", "content": "4"}]}', "line 3 has the key 'role' twice"),
        (LINES + b'{"question": "3", "answer": "4"}', r"line 3 has no prompt \(it has question, answer\)"),
        (LINES + b'{"messages": [{"role": "user"}]}', r"line 3 has no prompt \(it has messages\)"),
        (LINES + b"{}", "line 3 has no prompt;"),
        (LINES + b'{"prompt": ""}', "line 3 has an empty prompt"),
        (LINES + b'{"prompt": []}', "line 3 has an empty prompt"),
        (LINES + b'{"prompt": null}', "line 3 has a prompt that is null"),
        (LINES + b'{"prompt": 12}', "line 3 has a prompt that is a number"),
        (LINES + b'{"prompt": true}', "line 3 has a prompt that is true or false"),
        (LINES + b'{"prompt": {"role": "user", "content": "1"}}', "line 3 has a prompt that is an object"),
        (LINES + b'{"prompt": ["1+1="]}', "line 3 has a prompt whose item 1 is a text"),
        (LINES + b'{"prompt": [{"from": "human", "value": "1"}]}', "line 3 .* message 1 has no text `role`"),
        (LINES + b'{"prompt": [{"role": 1, "content": "1"}]}', "line 3 .* message 1 has no text `role`"),
        (LINES + b'{"prompt": [{"role": "user"}]}', "line 3 .* message 1 has no `content`"),
        (LINES + b'{"prompt": [{"role": "user", "content": 3}]}', "line 3 .* message 1 has no `content`"),
        (LINES + b'{"prompt": "3", "completion": [{"role": "assistant"}]}', "line 3 has completion of type list"),
        (LINES + b'{"prompt": "3", "images": 0}', "line 3 has images that are not a list"),
        (b"\xef\xbb\xbf", "holds no prompt"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_examples(str(tmp_path / "p.jsonl"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "p.jsonl") in str(caught.value)


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match=r"cannot be read as JSON lines \(not a regular file\)"):
            read_examples(str(path))


@pytest.mark.parametrize(
    "prompt",
    [
        MESSAGES,
        [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}],
        [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": "2"},
        ],
    ],
)
def test_messages_of_chat_templates_are_read(tmp_path, prompt):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}))
    assert read_examples(str(tmp_path / "p.jsonl"))[0].prompt == prompt


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}={% else %}+{% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def test_completion_continues_a_last_message_of_the_assistant():
    """As in TRL; another turn would begin after an end that the student never sees in use."""
    text = TextProcessor(tokenizer(chat_template=TEMPLATE), None, 0)

    def decoded(messages):
        return text.decode(text.encode(messages)[0])

    assert decoded(MESSAGES) == "+1+1=\n="
    assert decoded([*MESSAGES, {"role": "assistant", "content": "12"}]) == "+1+1=\n=12"


def test_error_of_a_tokenizer_names_the_line(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1="}) + "\n" + json.dumps({"prompt": MESSAGES}))
    examples = read_examples(str(tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match=r"p\.jsonl line 2: the student's chat template does not take a prompt"):
        encode(TextProcessor(tokenizer(), None, 0), examples, 9)


class Vocabulary:
    def __init__(self, *tokens, **other):
        self.vocab = {**{token: i for i, token in enumerate(tokens)}, **other}

    def get_vocab(self):
        return self.vocab


def test_tokenizer_with_more_tokens_shares_the_ids_before_them():
    student = Vocabulary("a", "b")
    assert num_shared_ids(student, Vocabulary("a", "b"), "t") > 1 << 32
    assert num_shared_ids(student, Vocabulary("a", "b", "<think>", "</think>"), "t") == 2
    assert num_shared_ids(student, Vocabulary("a", "b", c=7, d=5), "t") == 5


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (Vocabulary("a"), "token 'b' is 1 for the student and missing for the teacher"),
        (Vocabulary("b", "a"), "token 'a' is 0 for the student and 1 for the teacher"),
        (Vocabulary("a", "c", "b"), "token 'b' is 1 for the student and 2 for the teacher"),
        (Vocabulary("a", "b", c=1), "token 'c' is missing for the student and 1 for the teacher"),
    ],
)
def test_tokenizers_that_differ_in_a_students_id_are_refused(teacher, says):
    with pytest.raises(InputError, match=f"t has another tokenizer: {says}"):
        num_shared_ids(Vocabulary("a", "b"), teacher, "t")
