from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from opdkernels.distillation.options import options_from
from opdkernels.distillation.state import build_task
from opdkernels.distillation.tasks import Addition, exact, find_reward, open_task, permuted, validate_prompts
from opdkernels.errors import InputError, UsageError


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000])
def test_permuted_is_a_permutation(n):
    assert sorted(permuted(i, n, "key") for i in range(n)) == list(range(n))
    if n >= 97:
        assert [permuted(i, n, "key") for i in range(n)] != [permuted(i, n, "other") for i in range(n)]


def test_held_out_sums_are_disjoint_from_training():
    task = Addition(0, "exact")
    trained = {task.example(i).prompt for i in range(8000)}
    held_out = {entry.prompt for entry in task.eval_examples(5000)}
    assert (len(trained), len(held_out)) == (8000, 2000)
    assert not trained & held_out
    assert all(
        eval(entry.prompt[:2].lstrip("0") + "+" + entry.prompt[3:5].lstrip("0") or "0") == int(entry.answer)
        for entry in task.eval_examples(20)
        if "0" not in entry.prompt
    )
    sums = open_task("sums")
    assert not {sums.example(i).prompt for i in range(3000)} & {entry.prompt for entry in sums.eval_examples(300)}


def test_each_epoch_is_another_permutation(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": str(i)}) for i in range(20)))
    task = open_task(str(tmp_path / "p.jsonl"))
    passes = [[task.example(20 * epoch + i).prompt for i in range(20)] for epoch in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(str, range(20)))
    assert passes[0] != passes[1]
    other = open_task(str(tmp_path / "p.jsonl"), seed=1)
    assert [other.example(i).prompt for i in range(20)] != passes[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 holds a list"),
        ('{"prompt": ""}', "line 2 has an empty prompt"),
        ('{"prompt": ["a"]}', "line 2 has a prompt whose item 1 is a text"),
        ('{"prompt": "a", "answer": 3}', "line 2 has answer of type int"),
        ('{"prompt": "a", "images": "x.png"}', "images that are not a list"),
        ('{"prompt": "\\ud800"}', r"line 2 has an unpaired surrogate, \\ud800"),
        ('{"prompt": [{"role": "user", "content": "a\\udc00"}]}', "line 2 has an unpaired surrogate"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "line 2 is not JSON"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(InputError, match=says):
        open_task(str(tmp_path / "p.jsonl"))


def test_empty_and_missing_files_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        open_task(str(tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match=r"x\.jsonl does not exist; give JSON lines, or a task"):
        open_task(str(tmp_path / "x.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        open_task(str(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match=r"a\\x00b cannot be read as JSON lines"):
        open_task("a\0b")


@pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "math:nothing", "math:pi", ".:f", ":f", "a..b:f", ""])
def test_unknown_rewards_are_refused(name):
    with pytest.raises(UsageError, match="reward"):
        find_reward(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError"),
        ("x = y", "NameError: name 'y' is not defined"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_failing_reward_import_is_named(tmp_path, monkeypatch, text, says):
    (tmp_path / "broken_reward.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"reward broken_reward:f .*{says}"):
        find_reward("broken_reward:f")


def test_reward_in_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "reward_here.py").write_text("from helper_here import f")
    (tmp_path / "helper_here.py").write_text("f = lambda prompt, answer, completion: 0.5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = list(sys.path)
    assert find_reward("reward_here:f")("", "", "") == 0.5
    assert sys.path == before


@pytest.mark.parametrize("answer", ["45", " 45", "45\n", "\t45 \r\n"])
def test_exact_ignores_surrounding_space(answer):
    assert [exact("x", answer, text) for text in ("45", " 45 \n7+8=15", answer, "4 5", "450")] == [1, 1, 1, 0, 0]


def test_options_that_a_task_ignores_are_refused():
    with pytest.raises(UsageError, match="remove eval_prompts"):
        open_task("addition", eval_prompts="x.jsonl")
    with pytest.raises(UsageError, match="remove reward"):
        open_task("reasoning_gym:chain_sum", reward="math:exp")


def test_reasoning_gym_held_out_items_are_disjoint_for_every_seed(monkeypatch):
    """reasoning_gym draws item i from the seed + i: adjacent seeds give the same items, shifted by one."""

    class Data:
        def __init__(self, name, size, seed):
            self.size, self.seed = size, seed

        def __len__(self):
            return self.size

        def __getitem__(self, i):
            return {"question": str(self.seed + i), "answer": ""}

    monkeypatch.setitem(
        sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=lambda name, size, seed: Data(name, size, seed))
    )
    tasks = [open_task("reasoning_gym:any", seed=seed) for seed in (0, 1, 2, 4094)]
    held_out = [[entry.prompt[0]["content"] for entry in task.eval_examples(3000)] for task in tasks]
    assert all(one == held_out[0] for one in held_out)
    seen = set(held_out[0])
    for task in tasks:
        trained = {task.example(i).prompt[0]["content"] for i in (*range(3000), (1 << 20) - 1)}
        assert not trained & seen
        seen |= trained
    assert max(map(int, seen)) < 1 << 32  # what NumPy takes as a seed
    with pytest.raises(UsageError, match="seeds below 4095"):
        open_task("reasoning_gym:any", seed=4095)


def test_lines_split_only_at_newline(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert open_task(str(tmp_path / "p.jsonl")).example(0).prompt == "a\u2028b"


def test_nonfinite_reward_is_refused(tmp_path):
    task = open_task("addition", reward="math:exp")
    with pytest.raises(InputError, match="the reward math:exp failed"):
        task.score(task.example(0), "1")
    for value in ("nan", "-inf", "1e+39", "-1e+300"):
        task._score = lambda prompt, answer, text, value=value: float(value)
        with pytest.raises(InputError, match=f"gave {value}".replace("+", r"\+")):
            task.score(task.example(0), "1")
    task._score = lambda prompt, answer, text: -3.4e38
    assert task.score(task.example(0), "1") == -3.4e38


def test_reward_that_exits_is_named():
    task = open_task("addition")
    task._score = lambda prompt, answer, text: sys.exit(3)
    with pytest.raises(InputError, match=r"the reward exact failed on .*SystemExit: 3"):
        task.score(task.example(0), "1")


OWN_SAMPLES = {"teacher": "t"}
OTHERS = {"teacher": "t", "on_policy_fraction": 0.5}
REWARDED = {"divergence_weight": 0, "reward_weight": 1, "num_generations": 2}


@pytest.mark.parametrize(
    ("given", "rows", "says"),
    [
        (
            {"teacher": "a=x,b=y"},
            [{}, {"teacher_id": "a"}],
            "'1=' has the teacher_id '' and no teacher has it; the teachers are a, b",
        ),
        (
            {"teacher": "a=x"},
            [{"teacher_id": "a"}, {"teacher_id": "c"}],
            "'2=' has the teacher_id 'c' and no teacher has it",
        ),
        (OTHERS, [{"completion": "3"}, {}], "'2=' has no `completion` and others have one"),
        ({**OTHERS, "teacher": "self"}, [{}, {}], "or exactly one teacher that is not self"),
        (
            {**OTHERS, "teacher": "a=x,b=y"},
            [{"teacher_id": "a"}, {"teacher_id": "b"}],
            "or exactly one teacher that is not self",
        ),
        (
            OWN_SAMPLES,
            [{}, {"images": ["gone.png"]}],
            r"an image of a prompt cannot be read \(.*gone\.png is not a file\)",
        ),
        (REWARDED, [{"answer": "1"}, {}], "'2=' has no `answer`, which the reward exact needs"),
        (REWARDED, [{"answer": "1"}, {"answer": "1\n2"}], "'2=' has an `answer` of several lines"),
    ],
)
def test_invalid_prompts_are_refused_before_the_run(tmp_path, given, rows, says):
    with pytest.raises(InputError, match=says):
        validate_prompts(*run_of(tmp_path, given, rows))


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"teacher": "a=x,b=y"}, [{"teacher_id": "b"}, {"teacher_id": "a"}]),
        (OWN_SAMPLES, [{"teacher_id": "c", "answer": "1\n2"}, {"completion": "3"}]),
        (OTHERS, [{}, {}]),
        ({**OTHERS, "teacher": "self"}, [{"completion": "3"}, {"completion": ""}]),
        (REWARDED, [{"answer": "1\n"}, {"answer": ""}]),
        ({**REWARDED, "reward": "math:dist"}, [{}, {"answer": "1\n2"}]),
    ],
)
def test_valid_prompts_are_accepted(tmp_path, given, rows):
    options, task = run_of(tmp_path, given, rows)
    assert len(task.representative_examples()) == len(rows)
    assert validate_prompts(options, task) is None


def run_of(folder, given, rows):
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}=", **row}) for i, row in enumerate(rows, 1)))
    options = options_from(None, {"student": "s", "prompts": str(folder / "p.jsonl"), **given})
    return options, open_task(options.prompts, reward=options.reward)


@pytest.mark.parametrize(
    ("row", "says"), [({}, "has no `answer`"), ({"answer": "1", "images": ["gone.png"]}, r"gone\.png is not a file")]
)
def test_only_used_held_out_prompts_are_validated(tmp_path, row, says):
    (tmp_path / "h.jsonl").write_text(
        "\n".join(json.dumps(one) for one in ({"prompt": "1=", "answer": "1"}, {"prompt": "2=", **row}))
    )
    arguments = {
        "student": "s",
        "teacher": "t",
        "prompts": str(tmp_path / "h.jsonl"),
        "eval_prompts": str(tmp_path / "h.jsonl"),
    }
    build_task(options_from(None, {**arguments, "num_eval_prompts": 1}))
    with pytest.raises(InputError, match=says):
        build_task(options_from(None, {**arguments, "num_eval_prompts": 2}))
