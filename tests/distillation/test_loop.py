from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opdkernels.distillation import evaluation, loop, state
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.loop import train
from opdkernels.distillation.options import options_from
from opdkernels.distillation.result import format_text
from opdkernels.errors import InputError, UsageError


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def log(folder: Path) -> list[dict]:
    """The rows of a log without times and what depends on them."""
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "peak_bytes", "tokens_per_s")}
        for row in read_rows(folder / "log.jsonl")
    ]


def test_reverse_kl_decreases(options, tmp_path):
    train(options(max_steps=60, batch_size=32, learning_rate=5e-3, snapshot_every=0), tmp_path)
    rows = log(tmp_path)
    assert sum(row["reverse_kl"] for row in rows[-5:]) < 0.5 * sum(row["reverse_kl"] for row in rows[:5])
    assert all(row["loss"] == pytest.approx(row["reverse_kl"], rel=1e-5) for row in rows)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1},
        {"teacher": "self", "ema_decay": 0.5, "prompts": "hints"},
        {"lora_rank": 2},
        {"on_policy_fraction": 0.5},
        {"precision": "stochastic"},
    ],
)
def test_resume_is_bit_exact(options, tmp_path, more):
    chosen = {"max_steps": 6, "save_steps": 2, "num_eval_prompts": 4, "snapshot_every": 2, "batch_size": 4, **more}
    if "prompts" in more:
        lines = [
            json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1), "teacher_context": f"{a}+1={a + 1}\n"})
            for a in range(9)
        ]
        (tmp_path / "hints").write_text("\n".join(lines))
        chosen |= {"prompts": str(tmp_path / "hints"), "eval_prompts": str(tmp_path / "hints")}
    train(options(**chosen), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        train_step = loop.train_step
        patch.setattr(
            loop,
            "train_step",
            lambda state, step, **more: train_step(state, step, **more) if step < 5 else sys.exit("killed"),
        )
        with pytest.raises(SystemExit):
            train(options(**chosen), tmp_path / "cut")
    assert train(options(**chosen), tmp_path / "cut").step == 6
    for step in (0, 2, 4, 6):
        assert digest(tmp_path / "cut" / f"checkpoint-{step}") == digest(tmp_path / "whole" / f"checkpoint-{step}")
    assert digest(tmp_path / "whole" / "checkpoint-6") != digest(tmp_path / "whole" / "checkpoint-0")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert read_rows(tmp_path / "cut" / "snapshots.jsonl") == read_rows(tmp_path / "whole" / "snapshots.jsonl")


def test_micro_batches_match_full_batch(options, tmp_path):
    result = []
    for size in (0, 3):
        train(
            options(
                max_steps=1, dtype="float32", optimizer="sgd", learning_rate=1.0, micro_batch_size=size, max_grad_norm=0
            ),
            tmp_path / str(size),
        )
        result.append(
            (load_file(tmp_path / str(size) / "checkpoint-1" / "model.safetensors"), log(tmp_path / str(size)))
        )
    for name, value in result[0][0].items():
        torch.testing.assert_close(result[1][0][name], value, rtol=1e-4, atol=1e-6)
    assert result[0][1][0]["reverse_kl"] == pytest.approx(result[1][1][0]["reverse_kl"], rel=1e-6)


def test_frozen_coordinates_are_bit_identical(options, places, tmp_path):
    from opdkernels import masks

    chosen = masks.random_subset(places / "student", 0.1, seed=1)
    chosen.save(tmp_path / "m.safetensors")
    train(options(masks=str(tmp_path / "m.safetensors"), learning_rate=0.1), tmp_path / "run")
    assert all(row["grad_norm_full"] > 2 * row["grad_norm"] for row in log(tmp_path / "run"))
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (0, 3))
    for name, mask in chosen.items():
        moved = before[name] != after[name]
        assert moved.any()
        assert not (moved & ~mask.to_bool()).any()


def test_reward_increases_without_teacher(options, tmp_path):
    result = train(
        options(
            teacher="",
            divergence_weight=0,
            reward_weight=1,
            num_generations=4,
            batch_size=16,
            max_steps=25,
            snapshot_every=0,
            learning_rate=3e-3,
            reward=f"{__name__}:begins_with_one",
        ),
        tmp_path,
    )
    rows = log(tmp_path)
    assert result.step == 25
    assert sum(row["reward"] for row in rows[-5:]) > 2 * sum(row["reward"] for row in rows[:5])


def begins_with_one(prompt, answer, completion):
    return float(completion.startswith("1"))


def test_sft_learns_completions_of_the_dataset(options, tmp_path):
    lines = [json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1), "completion": str(a + 1)}) for a in range(1, 9)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    chosen = options(
        prompts=str(tmp_path / "p.jsonl"),
        eval_prompts=str(tmp_path / "p.jsonl"),
        teacher="",
        divergence_weight=0,
        sft_weight=1,
        on_policy_fraction=0,
        max_steps=80,
        snapshot_every=0,
        learning_rate=1e-2,
        num_eval_prompts=8,
    )
    assert train(chosen, tmp_path / "run").accuracy[-1] == (80, 1.0)


def test_sft_learns_samples_of_the_teacher(options, tmp_path):
    train(
        options(
            divergence_weight=0,
            sft_weight=1,
            on_policy_fraction=0,
            max_steps=30,
            snapshot_every=0,
            batch_size=32,
            learning_rate=3e-3,
        ),
        tmp_path,
    )
    rows = log(tmp_path)
    assert not any(row["on_policy"] for row in rows)
    assert sum(row["log_prob"] for row in rows[-5:]) > sum(row["log_prob"] for row in rows[:5]) + 0.5


def test_prompts_select_teachers_by_id(options, places, tmp_path):
    lines = [json.dumps({"prompt": "1+1=", "teacher_id": name}) for name in ("a", "b")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    teachers = f"a={places / 'teacher'},b={places / 'other'}"
    train(options(prompts=str(tmp_path / "p.jsonl"), teacher=teachers), tmp_path / "run")
    with pytest.raises(InputError, match="teacher_id 'b' and no teacher has it"):
        train(options(prompts=str(tmp_path / "p.jsonl"), teacher=f"a={places / 'teacher'}"), tmp_path / "one")


def test_run_resumes_after_sigterm(options, tmp_path):
    command = [sys.executable, "-m", "opdkernels", "distill", "-o", str(tmp_path / "cut")]
    chosen = options(max_steps=4000)
    for name, value in chosen.model_dump().items():
        if value not in ("", None) and value != type(chosen).model_fields[name].default:
            command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "log.jsonl").exists() or not log(tmp_path / "cut"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    stopped = log(tmp_path / "cut")[-1]["step"]
    assert (tmp_path / "cut" / f"checkpoint-{stopped}" / "training.pt").exists()
    assert train(options(max_steps=stopped + 2), tmp_path / "cut").step == stopped + 2
    train(options(max_steps=stopped + 2), tmp_path / "whole")
    assert digest(tmp_path / "cut" / f"checkpoint-{stopped + 2}") == digest(
        tmp_path / "whole" / f"checkpoint-{stopped + 2}"
    )


@pytest.mark.parametrize(("step", "status"), [(1, 128 + signal.SIGTERM), (2, 0)])
def test_signal_in_the_last_step_does_not_interrupt_the_run(options, tmp_path, monkeypatch, step, status):
    train_step = loop.train_step

    def signalled(state, current, **more):
        if current == step:
            signal.raise_signal(signal.SIGTERM)
        return train_step(state, current, **more)

    monkeypatch.setattr(loop, "train_step", signalled)
    result = train(options(), tmp_path)
    assert (result.step, result.signal, result.exit_status) == (step + 1, signal.SIGTERM, status)
    assert result.is_interrupted == bool(status)
    assert ("rerun the same command to resume" in format_text(result)[0]) == bool(status)


def test_signal_of_another_process_is_in_the_result(options, tmp_path, monkeypatch):
    """Two processes, of which this one receives nothing."""
    from opdkernels.distillation.world import World

    monkeypatch.setattr(
        World,
        "all_reduce",
        lambda self, values, device: {name: 1 if name == "stop" else x for name, x in values.items()},
    )
    monkeypatch.setattr(World, "all_gather", lambda self, value: [value, signal.SIGTERM] if value == 0 else [value])
    result = train(options(num_eval_prompts=0, snapshot_every=0), tmp_path)
    assert (result.step, result.signal, result.exit_status) == (1, signal.SIGTERM, 128 + signal.SIGTERM)


def test_last_snapshot_has_optimizer_statistics(options, tmp_path):
    snapshots = train(options(max_steps=5, snapshot_every=2), tmp_path).snapshots
    assert [snapshot["step"] for snapshot in snapshots] == [2, 4, 5]
    assert all(snapshot["sqrt_v_cv"] is not None for snapshot in snapshots)


def test_steps_with_empty_completions_are_reported_as_such(options, places, tmp_path):
    from tests.distillation.conftest import model, tokenizer

    student = model(0)
    student.generation_config.eos_token_id = None
    student.save_pretrained(tmp_path / "s")
    tokenizer(eos_token=None).save_pretrained(tmp_path / "s")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": ""}))
    chosen = options(
        student=str(tmp_path / "s"), prompts=str(tmp_path / "p.jsonl"), on_policy_fraction=0, divergence_weight=0,
        sft_weight=1, teacher="", max_steps=9,
    )  # fmt: skip
    with pytest.raises(InputError, match="every completion of 3 consecutive steps is empty") as caught:
        train(chosen, tmp_path / "run")
    assert "learning_rate" not in str(caught.value)


def test_messages_without_chat_template_write_nothing(options, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": [{"role": "system", "content": "1"}]}))
    with pytest.raises(InputError, match=r"p\.jsonl line 1: the student's chat template does not take a prompt"):
        train(options(prompts=str(tmp_path / "p.jsonl")), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_nan_teacher_ends_run_without_changing_weights(options, places, tmp_path, monkeypatch):
    """The validation at the start sees four ids only; here it sees none."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("opdkernels.distillation.models.validate_lm_head", lambda model, path: None)
    teacher = AutoModelForCausalLM.from_pretrained(places / "teacher", dtype=torch.bfloat16)
    teacher.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    teacher.save_pretrained(tmp_path / "nan")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nan" / file).write_bytes((places / "teacher" / file).read_bytes())
    with pytest.raises(InputError, match=r"3 consecutive steps had no finite loss.*check the teacher"):
        train(options(teacher=str(tmp_path / "nan"), max_steps=9, save_steps=1), tmp_path / "run")
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all("loss nan" in row["skip_reason"] and row["loss"] is None for row in rows)
    assert digest(tmp_path / "run" / "checkpoint-2") == digest(tmp_path / "run" / "checkpoint-0")


def test_full_disk_keeps_existing_checkpoints(options, tmp_path, monkeypatch):
    train(options(max_steps=2, save_steps=1), tmp_path)
    before = digest(tmp_path / "checkpoint-2")

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", os.fspath(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(options(max_steps=3, save_steps=1), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        "checkpoint-0",
        "checkpoint-1",
        "checkpoint-2",
    ]
    monkeypatch.undo()
    assert train(options(max_steps=3, save_steps=1), tmp_path).step == 3
    assert digest(tmp_path / "checkpoint-2") == before


def test_failing_reward_is_named(options, tmp_path):
    with pytest.raises(
        InputError, match=r"the reward .*:fails failed on 12\+.*KeyError: 'x'.*run the same command again"
    ):
        train(
            options(
                teacher="",
                divergence_weight=0,
                reward_weight=1,
                num_generations=2,
                prompts=sums(tmp_path),
                reward=f"{__name__}:fails",
            ),
            tmp_path / "run",
        )


def sums(folder: Path) -> str:
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "12+13=", "answer": "25"}))
    return str(folder / "p.jsonl")


def fails(prompt, answer, completion):
    return {}["x"]


def test_other_tokenizer_is_refused(options, places, tmp_path):
    from tests.distillation.conftest import model, tokenizer

    characters = "9876543210+=\n"
    model(5, characters=characters).save_pretrained(tmp_path / "t")
    tokenizer(characters).save_pretrained(tmp_path / "t")
    with pytest.raises(
        InputError, match=r"has another tokenizer: token '0' is 2 for the student and 11 for the teacher"
    ):
        train(options(teacher=str(tmp_path / "t")), tmp_path / "run")


def test_teacher_with_more_tokens_scores_the_students_ids(options, tmp_path):
    """Both heads have a row for the teacher's token, which the student's tokenizer cannot write: no one samples it.

    Student and teacher differ in the rows beyond the student's ids only, so that their divergence begins at 0.
    """
    from tests.distillation.conftest import CHARACTERS, model, tokenizer

    common = [*CHARACTERS, "<|endoftext|>"]  # which transformers adds to a tokenizer of this architecture
    for name, tokens in (("student", common), ("teacher", [*common, "<think>"])):
        padded = model(5, characters=CHARACTERS + "???")
        rows = padded.lm_head.weight.data[len(common) + 2 :]
        rows += 9 if name == "student" else -9  # likely to be sampled, were they not left out
        padded.save_pretrained(tmp_path / name)
        tokenizer(tokens).save_pretrained(tmp_path / name)
    chosen = options(student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), num_eval_prompts=4)
    samplers = []
    with pytest.MonkeyPatch.context() as patch:
        build_sampler = state.build_sampler
        for module in (state, evaluation):
            patch.setattr(module, "build_sampler", lambda *args: samplers.append(build_sampler(*args)) or samplers[-1])
        train(chosen, tmp_path / "run")
        assert evaluation.evaluate_checkpoint(chosen, tmp_path / "run" / "checkpoint-3")
    assert [sampler.vocab_size for sampler in samplers] == [len(common) + 2] * 2
    first = next(row["reverse_kl"] for row in log(tmp_path / "run") if "reverse_kl" in row)
    assert first == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="token '<think>' is 16 for the student and missing for the teacher"):
        train(options(student=chosen.teacher, teacher=chosen.student), tmp_path / "swapped")


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_padded_heads_share_common_ids(options, tmp_path, side):
    from tests.distillation.conftest import CHARACTERS, model, tokenizer

    padded = model(5, characters=CHARACTERS + "abc")
    padded.lm_head.weight.data[15:] += 1  # likely, were they not left out
    padded.save_pretrained(tmp_path / "padded")
    tokenizer().save_pretrained(tmp_path / "padded")
    train(options(**{side: str(tmp_path / "padded")}), tmp_path / "run")
    assert all(math.isfinite(row["loss"]) and row["tokens"] for row in log(tmp_path / "run"))


def test_pad_token_is_optional(options, places, tmp_path):
    from tests.distillation.conftest import model, tokenizer

    model(0, initializer_range=0.2).bfloat16().save_pretrained(tmp_path / "s")
    tokenizer(pad_token=None).save_pretrained(tmp_path / "s")
    assert train(options(student=str(tmp_path / "s"), prompts=mixed(tmp_path)), tmp_path / "run").step == 3


def mixed(folder: Path) -> str:
    (folder / "m.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("1+1=", "12+13=", "2=")))
    return str(folder / "m.jsonl")


def test_prompts_are_truncated_before_sampling(options, tmp_path):
    train(options(prompts=mixed(tmp_path), max_prompt_length=3, batch_size=3, max_steps=1), tmp_path / "run")
    assert log(tmp_path / "run")[0]["prompts_truncated"] == 2


def test_max_steps_below_taken_steps_is_refused(options, tmp_path):
    train(options(max_steps=2), tmp_path / "run")
    with pytest.raises(
        UsageError, match="has taken 2 steps and max_steps is 1; set it to at least as many, or overwrite the run"
    ):
        train(options(max_steps=1), tmp_path / "run")


def test_folder_as_configuration_is_named(tmp_path):
    with pytest.raises(InputError, match=r"is not a regular file; give a TOML file of options"):
        options_from(tmp_path, {})


def test_folder_with_another_run_is_refused(options, tmp_path):
    train(options(max_steps=1), tmp_path)
    with pytest.raises(UsageError, match="holds another run"):
        train(options(max_steps=1, seed=1), tmp_path)
    assert train(options(max_steps=1, seed=1, overwrite=True), tmp_path).step == 1
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("x")
    (tmp_path / "else" / "checkpoint-5").mkdir()
    for overwrite in (False, True):
        with pytest.raises(InputError, match="has a folder checkpoint-5 that no run created"):
            train(options(max_steps=1, overwrite=overwrite), tmp_path / "else")
    (tmp_path / "else" / "checkpoint-5").rmdir()
    assert train(options(max_steps=1), tmp_path / "else").step == 1
    assert (tmp_path / "else" / "thesis.tex").read_text() == "x"


def test_run_killed_before_first_checkpoint_restarts(options, tmp_path, monkeypatch):
    chosen = options(max_steps=2, num_eval_prompts=4)
    train_step = loop.train_step
    monkeypatch.setattr(
        loop,
        "train_step",
        lambda state, step, **more: train_step(state, step, **more) if step < 1 else sys.exit("killed"),
    )
    with pytest.raises(SystemExit):
        train(chosen, tmp_path / "cut")
    monkeypatch.undo()
    train(chosen, tmp_path / "cut")
    train(chosen, tmp_path / "whole")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert read_rows(tmp_path / "cut" / "scores.jsonl") == read_rows(tmp_path / "whole" / "scores.jsonl")


def test_run_killed_before_finish_completes_snapshots(options, tmp_path, monkeypatch):
    from opdkernels.distillation.tracker import Tracker

    chosen = options(max_steps=2, num_eval_prompts=4, save_steps=1, snapshot_every=1)
    train(chosen, tmp_path / "whole")
    monkeypatch.setattr(Tracker, "finish", lambda self: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train(chosen, tmp_path / "cut")
    monkeypatch.undo()
    assert train(chosen, tmp_path / "cut").accuracy == train(chosen, tmp_path / "whole").accuracy
    assert read_rows(tmp_path / "cut" / "snapshots.jsonl") == read_rows(tmp_path / "whole" / "snapshots.jsonl")
    assert not list((tmp_path / "cut" / "weights").iterdir())


def test_log_is_written_before_final_checkpoint(options, tmp_path, monkeypatch):
    save = loop.save
    monkeypatch.setattr(
        loop, "save", lambda folder, step, *rest: save(folder, step, *rest) if step < 2 else sys.exit("killed")
    )
    with pytest.raises(SystemExit):
        train(options(max_steps=2, num_eval_prompts=4, save_steps=1), tmp_path / "cut")
    monkeypatch.undo()
    assert (
        train(options(max_steps=2, num_eval_prompts=4, save_steps=1), tmp_path / "cut").accuracy
        == train(options(max_steps=2, num_eval_prompts=4, save_steps=1), tmp_path / "whole").accuracy
    )
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_changed_prompt_file_is_another_run(options, tmp_path):
    chosen = options(prompts=mixed(tmp_path), max_steps=1)
    train(chosen, tmp_path / "run")
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "9="}))
    with pytest.raises(UsageError, match="holds another run"):
        train(chosen, tmp_path / "run")


def test_missing_weights_are_named(options, places, tmp_path):
    from safetensors.torch import save_file

    for file in (places / "student").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        train(options(student=str(tmp_path)), tmp_path / "run")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    with pytest.raises(InputError, match="cannot be loaded as a model"):
        train(options(student=str(tmp_path)), tmp_path / "run")


def test_unsupported_lm_head_is_refused(options, places, tmp_path, monkeypatch):
    from opdkernels.distillation import models

    known = models.lm_head_of
    monkeypatch.setattr(
        models, "lm_head_of", lambda model, vocab=None: dataclasses.replace(known(model, vocab), scale=2.0)
    )
    with pytest.raises(InputError, match="computes its logits in an unsupported way"):
        train(options(), tmp_path)


def test_completion_length_must_fit_positions(options, tmp_path):
    with pytest.raises(UsageError, match="have 64 positions"):
        train(options(max_completion_length=64), tmp_path)


def test_masks_of_unknown_parameters_are_refused(options, tmp_path):
    from opdkernels.masks.mask_set import from_bools

    from_bools(
        {"lm_head.weight": torch.ones(15, 32, dtype=torch.bool), "model.other.weight": torch.ones(3, dtype=torch.bool)}
    ).save(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"mask of model\.other\.weight and no such parameter"):
        train(options(masks=str(tmp_path / "m.safetensors")), tmp_path / "run")


def test_self_teacher_cannot_sample_off_policy(options, tmp_path):
    with pytest.raises(InputError, match="exactly one teacher that is not self"):
        train(options(teacher="self", on_policy_fraction=0), tmp_path)


def test_damaged_training_state_is_named(options, tmp_path):
    train(options(max_steps=1), tmp_path)
    (tmp_path / "checkpoint-1" / "training.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"training\.pt cannot be read .*start again with --overwrite"):
        train(options(max_steps=2), tmp_path)


def test_update_stays_in_lora_subspace(options, tmp_path):
    first = tmp_path / "first"
    train(options(max_steps=2, learning_rate=1e-2), first)
    chosen = options(lora_rank=4, subspace=str(first / "checkpoint-2"), learning_rate=1e-2, max_steps=3, save_steps=1)
    train(chosen, tmp_path / "run")
    start, early, end = (
        load_file(folder / "model.safetensors")
        for folder in (first / "checkpoint-0", first / "checkpoint-2", tmp_path / "run" / "checkpoint-3")
    )
    moved = 0
    for name in (name for name in start if "proj.weight" in name):
        v = torch.linalg.svd(early[name].float() - start[name].float()).Vh[:4]
        change = end[name].float() - start[name].float()
        moved += int(change.count_nonzero())
        outside = change - change @ v.T @ v
        assert (
            outside.norm() <= 2**-8 * end[name].float().norm() < 0.5 * change.norm()
        )  # the merged weights are rounded to bf16
    assert moved
    for name in (name for name in start if "proj.weight" not in name):
        assert torch.equal(start[name], end[name])
    same = tmp_path / "moved"
    first.rename(same)
    train(
        options(lora_rank=4, subspace=str(same / "checkpoint-2"), learning_rate=1e-2, max_steps=3, save_steps=1),
        tmp_path / "run",
    )  # by content
    with pytest.raises(InputError, match="give a later checkpoint of this student"):
        train(options(lora_rank=4, subspace=options().teacher), tmp_path / "other")


def test_lora_subspace_of_transposed_layers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from opdkernels.distillation.optimizers import with_lora

    torch.manual_seed(0)
    student_model = GPT2LMHeadModel(GPT2Config(vocab_size=15, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    student_model.save_pretrained(tmp_path / "later")
    start = {name: p.detach().clone() for name, p in student_model.named_parameters()}
    with torch.no_grad():
        student_model.transformer.h[0].attn.c_attn.weight += torch.randn(32, 1) @ torch.randn(1, 96)  # [in, out]
    chosen = options_from(
        None,
        {"student": "s", "teacher": "t", "prompts": "addition", "lora_rank": 2, "subspace": str(tmp_path / "later")},
    )
    layer = with_lora(chosen, student_model).get_base_model().transformer.h[0].attn.c_attn
    change = start["transformer.h.0.attn.c_attn.weight"] - layer.base_layer.weight
    kept = layer.lora_A["default"].weight[:1].T  # [in, 1]
    torch.testing.assert_close(kept @ (kept.T @ change), change, rtol=1e-3, atol=1e-4)
    assert not student_model.transformer.h[0].mlp.c_proj.lora_A["default"].weight.any()
