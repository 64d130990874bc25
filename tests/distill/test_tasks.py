from __future__ import annotations

import json

import pytest

from opdkernels.distill.tasks import Addition, open_task, permuted, scorer
from opdkernels.errors import InputError, UsageError


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000])
def test_a_permutation_takes_every_place_once(n):
    assert sorted(permuted(i, n, "key") for i in range(n)) == list(range(n))
    if n >= 97:
        assert [permuted(i, n, "key") for i in range(n)] != [permuted(i, n, "other") for i in range(n)]


def test_held_out_sums_are_never_trained_on():
    task = Addition(0, "exact")
    trained = {task.entry(i).prompt for i in range(8000)}
    held_out = {entry.prompt for entry in task.held_out(5000)}
    assert (len(trained), len(held_out)) == (8000, 2000)
    assert not trained & held_out
    assert all(eval(entry.prompt[:2].lstrip("0") + "+" + entry.prompt[3:5].lstrip("0") or "0") == int(entry.answer) for entry in task.held_out(20) if "0" not in entry.prompt)
    sums = open_task("sums")
    assert not {sums.entry(i).prompt for i in range(3000)} & {entry.prompt for entry in sums.held_out(300)}


def test_every_pass_over_lines_takes_each_once_in_another_order(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": str(i)}) for i in range(20)))
    task = open_task(str(tmp_path / "p.jsonl"))
    passes = [[task.entry(20 * epoch + i).prompt for i in range(20)] for epoch in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(str, range(20)))
    assert passes[0] != passes[1]
    other = open_task(str(tmp_path / "p.jsonl"), seed=1)
    assert [other.entry(i).prompt for i in range(20)] != passes[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no prompt"),
        ('{"prompt": ""}', "line 2 has no prompt"),
        ('{"prompt": ["a"]}', "line 2 has no prompt"),
        ('{"prompt": "a", "answer": 3}', "line 2 has answer of int"),
        ('{"prompt": "a", "images": "x.png"}', "images that are no list"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(InputError, match=says):
        open_task(str(tmp_path / "p.jsonl"))


def test_files_that_hold_nothing_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        open_task(str(tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match=r"x\.jsonl does not exist; give JSON lines, or a task"):
        open_task(str(tmp_path / "x.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        open_task(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "math:nothing", "math:pi"])
def test_rewards_that_do_not_exist_are_refused(name):
    with pytest.raises(UsageError, match="reward"):
        scorer(name)


def test_what_a_task_would_ignore_is_refused():
    with pytest.raises(UsageError, match="leave held_out out"):
        open_task("addition", held_out="x.jsonl")
    with pytest.raises(UsageError, match="leave reward out"):
        open_task("reasoning_gym:chain_sum", reward="math:exp")


def test_a_line_may_hold_any_separator_but_its_end(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert open_task(str(tmp_path / "p.jsonl")).entry(0).prompt == "a\u2028b"


def test_a_reward_that_is_no_number_is_refused(tmp_path):
    task = open_task("addition", reward="math:exp")
    with pytest.raises(InputError, match="the reward math:exp failed"):
        task.score(task.entry(0), "1")
    task._score = lambda prompt, answer, text: float("nan")
    with pytest.raises(InputError, match="gave nan"):
        task.score(task.entry(0), "1")
