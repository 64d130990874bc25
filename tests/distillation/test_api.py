"""`opdkernels.distillation.api.distill` with objects in place of files."""

from __future__ import annotations

import doctest
import importlib
import inspect
import typing

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdkernels.distillation.api import distill
from opdkernels.distillation.loop import train
from opdkernels.distillation.options import DistillOptions, demo_options, options_from
from opdkernels.errors import InputError, UsageError
from tests.distillation.test_loop import digest, log

ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(1, 9)]
SHORT = {"max_steps": 2, "batch_size": 4, "max_completion_length": 4, "learning_rate": 1e-3, "threads": 1}


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def length_reward(prompt, answer, completion):
    return float(len(completion))


def test_keywords_are_the_fields_of_the_options():
    parameters = inspect.signature(distill).parameters
    assert set(DistillOptions.model_fields) <= set(parameters)
    extra = {"out", "config", "processing_class", "callbacks", "quiet"}
    assert set(parameters) - set(DistillOptions.model_fields) == extra
    own_options = {"student", "teacher", "prompts", "eval_prompts", "reward", "device", "betas"}
    hints = typing.get_type_hints(distill)
    for name in set(DistillOptions.model_fields) - own_options:
        annotation = DistillOptions.model_fields[name].annotation
        assert hints[name] == typing.Optional[annotation], name  # noqa: UP045


def test_loaded_models_train_as_their_folders_do(places, tmp_path):
    student = load(places / "student")
    by_object = distill(
        student,
        load(places / "teacher"),
        "addition",
        tmp_path / "object",
        processing_class=AutoTokenizer.from_pretrained(places / "student"),
        **SHORT,
    )
    by_path = distill(places / "student", places / "teacher", "addition", tmp_path / "path", **SHORT)
    assert by_object.step == by_path.step == 2
    assert digest(tmp_path / "object" / "checkpoint-2") == digest(tmp_path / "path" / "checkpoint-2")
    assert log(tmp_path / "object") == log(tmp_path / "path")
    trained = load_file(tmp_path / "object" / "checkpoint-2" / "model.safetensors")
    for name, param in student.named_parameters():
        assert torch.equal(param.detach(), trained[name])


def test_a_trained_model_keeps_no_hooks(places, tmp_path):
    student = load(places / "student")
    distill(
        student,
        places / "teacher",
        "addition",
        processing_class=AutoTokenizer.from_pretrained(places / "student"),
        **SHORT,
    )
    student(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(param.grad is not None for param in student.parameters())


def test_rows_train_as_a_file_of_them_does(places, tmp_path):
    import json

    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    models = places / "student", places / "teacher"
    distill(*models, ROWS, tmp_path / "rows", eval_prompts=ROWS[:3], **SHORT)
    path = tmp_path / "p.jsonl"
    distill(*models, path, tmp_path / "file", eval_prompts=path, num_eval_prompts=3, **SHORT)
    assert digest(tmp_path / "rows" / "checkpoint-2") == digest(tmp_path / "file" / "checkpoint-2")
    assert log(tmp_path / "rows") == log(tmp_path / "file")


def test_texts_and_columns_with_none_are_rows(places):
    rows = ["1+1=", {"prompt": "2+2=", "answer": None, "images": None}]
    assert distill(places / "student", places / "teacher", rows, **SHORT).step == 2


def test_resume_is_bit_exact_with_objects(places, tmp_path):
    def run(out, **options):
        return distill(
            load(places / "student"),
            load(places / "teacher"),
            ROWS,
            out,
            processing_class=AutoTokenizer.from_pretrained(places / "student"),
            **{**SHORT, **options},
        )

    run(tmp_path / "cut", save_steps=2, snapshot_every=2)
    assert run(tmp_path / "cut", save_steps=2, snapshot_every=2, max_steps=4).step == 4
    run(tmp_path / "whole", save_steps=2, snapshot_every=2, max_steps=4)
    assert digest(tmp_path / "cut" / "checkpoint-4") == digest(tmp_path / "whole" / "checkpoint-4")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["student", "teacher", "prompts", "reward"])
def test_other_objects_are_another_run(places, tmp_path, changed):
    def run(**other):
        student, teacher = load(places / "student"), load(places / "teacher")
        for name, model in (("student", student), ("teacher", teacher)):
            if name in other:
                model.lm_head.weight.data[0, 0] += 1
        return distill(
            student,
            teacher,
            other.get("prompts", ROWS),
            tmp_path,
            processing_class=AutoTokenizer.from_pretrained(places / "student"),
            reward=other.get("reward", "exact"),
            eval_prompts=ROWS[:2],
            **SHORT,
        )

    run()
    assert run().step == 2
    with pytest.raises(UsageError, match="holds another run"):
        run(**{changed: {"prompts": ROWS[:-1], "reward": length_reward}.get(changed, True)})


def test_a_reward_function_scores_completions(places, tmp_path):
    result = distill(
        places / "student", None, ROWS, tmp_path, reward=length_reward, divergence_weight=0.0, reward_weight=1.0,
        num_generations=2, **SHORT,
    )  # fmt: skip
    assert result.step == 2
    assert all(row["reward"] >= 0 for row in log(tmp_path) if row["step"])


def test_callbacks_are_called_if_they_have_the_method(places, tmp_path):
    calls = []

    class Recorder:
        def on_step_end(self, step, metrics):
            calls.append(("step", step, metrics["tokens"] > 0))

        def on_save(self, step, path):
            calls.append(("save", step, path.name))

        def on_train_end(self, result):
            calls.append(("end", result.step))

    distill(places / "student", places / "teacher", ROWS, tmp_path, callbacks=[Recorder(), object()], **SHORT)
    assert calls == [("step", 1, True), ("step", 2, True), ("save", 2, "checkpoint-2"), ("end", 2)]


def test_teachers_by_id_may_mix_objects_and_folders(places):
    rows = [{"prompt": "1+1=", "teacher_id": name} for name in ("a", "b")]
    teachers = {"a": load(places / "teacher"), "b": places / "other"}
    assert distill(places / "student", teachers, rows, **SHORT).step == 2


def test_keywords_override_a_config(places, tmp_path):
    config = options_from(
        None, {**demo_options(), "batch_size": 4, "max_steps": 9, "num_eval_prompts": 0, "threads": 1}
    )
    assert distill(config=config, out=tmp_path / "a", max_steps=2).step == 2
    train(config.model_copy(update={"max_steps": 2}), tmp_path / "b")
    assert digest(tmp_path / "a" / "checkpoint-2") == digest(tmp_path / "b" / "checkpoint-2")


def test_no_folder_keeps_no_files(places):
    result = distill(places / "student", places / "teacher", ROWS, **SHORT)
    assert result.path is None
    assert result.snapshots[-1]["step"] == 2


def test_missing_and_wrong_inputs_are_named(places):
    with pytest.raises(UsageError, match="there is no student; pass it to distill"):
        distill(None, places / "teacher", ROWS)
    with pytest.raises(UsageError, match="there is no prompts"):
        distill(places / "student", places / "teacher")
    with pytest.raises(UsageError, match="a model is a int; pass a folder"):
        distill(3, places / "teacher", ROWS)
    with pytest.raises(InputError, match="row 1 of prompts has no prompt"):
        distill(places / "student", places / "teacher", ["1=", {"question": "2="}])
    with pytest.raises(InputError, match="prompts holds no prompt"):
        distill(places / "student", places / "teacher", [])
    with pytest.raises(UsageError, match="remove eval_prompts"):
        distill(places / "student", places / "teacher", "addition", eval_prompts=ROWS)
    student = load(places / "student")
    student.config._name_or_path = ""
    with pytest.raises(UsageError, match="pass it as processing_class"):
        distill(student, places / "teacher", ROWS)


@pytest.mark.parametrize("name", ["api", "objective", "options", "rollout", "tasks"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"opdkernels.distillation.{name}"))
    assert results.failed == 0
    assert results.attempted
