from __future__ import annotations

import pytest
import torch

from opdkernels.distillation import teachers
from opdkernels.distillation.checkpointing import copy_tensors
from opdkernels.distillation.examples import Example
from opdkernels.distillation.rollout import encode, pad_rollout
from opdkernels.distillation.teachers import SelfTeacher, score_with
from opdkernels.distillation.text import TextProcessor
from opdkernels.distillation.world import Student, World
from opdkernels.errors import InputError
from opdkernels.optim import MaskedAdamW
from tests.distillation.conftest import model, tokenizer

TEXT = TextProcessor(tokenizer(), None, 0)


def setup(ema: float, dtype=torch.bfloat16, density: float = 0.3):
    torch.manual_seed(0)
    student_model = model(0, initializer_range=0.2).to(dtype).eval()
    masks = {name: torch.rand(p.shape) < density for name, p in student_model.named_parameters()}
    optimizer = MaskedAdamW(student_model.named_parameters(), masks=masks, lr=0.05)
    return (
        student_model,
        optimizer,
        SelfTeacher(Student(student_model, World()), optimizer, ema_decay=ema, text=TEXT, max_completion_length=3),
    )


def step(own, optimizer, teacher):
    for param in own.parameters():
        param.grad = torch.randn(param.shape).to(param.dtype)
    optimizer.step()
    teacher.after_step()


def rollout(teacher_context=None):
    entries = [Example("1+1=", teacher_context=teacher_context), Example("12+13=", teacher_context=teacher_context)]
    return pad_rollout(
        encode(TEXT, entries, 32),
        [[4, 1], [5, 6, 7]],
        [True, False],
        on_policy=True,
        pad_id=0,
        device=torch.device("cpu"),
    )


def weights(own):
    return {name: p.detach().clone() for name, p in own.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_initial_weights_are_swapped_in_and_out_bit_exactly(dtype):
    student_model, optimizer, teacher = setup(1.0, dtype)
    start, (hidden, head) = weights(student_model), teacher.score(rollout())
    for _ in range(3):
        step(student_model, optimizer, teacher)
    trained = weights(student_model)
    again, again_head = teacher.score(rollout())
    assert torch.equal(again, hidden)
    assert torch.equal(again_head.weight, head.weight)
    assert torch.equal(again_head.weight, start["lm_head.weight"])
    assert all(torch.equal(p, trained[name]) for name, p in student_model.named_parameters())
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])


def test_student_weights_are_restored_if_scoring_fails(monkeypatch):
    student_model, optimizer, teacher = setup(1.0)
    step(student_model, optimizer, teacher)
    trained = weights(student_model)

    def fails(model, rollout):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teachers, "score_with", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher.score(rollout())
    assert all(torch.equal(p, trained[name]) for name, p in student_model.named_parameters())


def test_ema_matches_plain_tensors():
    student_model, optimizer, teacher = setup(0.9, torch.float32)
    expected = weights(student_model)
    for _ in range(4):
        step(student_model, optimizer, teacher)
        for name, value in weights(student_model).items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    with teacher.with_teacher_weights():
        for name, value in student_model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_teacher_state_dict_roundtrip():
    student_model, optimizer, teacher = setup(0.5)
    for _ in range(3):
        step(student_model, optimizer, teacher)
    other = SelfTeacher(Student(student_model, World()), optimizer, ema_decay=0.5, text=TEXT, max_completion_length=3)
    copy_tensors("teacher", other.state_dict(), teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.values, teacher.values, strict=True))


def test_teacher_context_precedes_the_same_completion():
    student_model, _, teacher = setup(1.0)
    hidden, _ = teacher.score(rollout("9+9=18\n"))
    direct = pad_rollout(
        encode(TEXT, [Example("9+9=18\n1+1="), Example("9+9=18\n12+13=")], 64),
        [[4, 1], [5, 6, 7]],
        [True, False],
        on_policy=True,
        pad_id=0,
        device=torch.device("cpu"),
    )
    assert torch.equal(hidden, score_with(student_model, direct)[0])
    assert hidden.shape == teacher.score(rollout())[0].shape
    assert not torch.equal(hidden, teacher.score(rollout())[0])


def test_teacher_context_must_fit_the_students_positions():
    _, _, teacher = setup(1.0)  # of 64 positions
    teacher.score(rollout("1" * (64 - 3 - len("12+13="))))
    with pytest.raises(
        InputError,
        match=r"the prompt '12\+13=' is 62 tokens with its `teacher_context`, and the student has 61 "
        "positions before the completion; shorten it",
    ):
        teacher.score(rollout("1" * (65 - 3 - len("12+13="))))
