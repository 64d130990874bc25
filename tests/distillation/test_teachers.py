from __future__ import annotations

import pytest
import torch

from opdkernels.distillation.models import Text
from opdkernels.distillation.rollout import beside, encode
from opdkernels.distillation.tasks import Entry
from opdkernels.distillation.teachers import OwnWeights, scored
from opdkernels.errors import InputError
from opdkernels.optim import MaskedAdamW
from tests.distillation.conftest import model, tokenizer

TEXT = Text(tokenizer(), None, 0)


def setup(ema: float, dtype=torch.bfloat16, density: float = 0.3):
    torch.manual_seed(0)
    own = model(0, initializer_range=0.2).to(dtype).eval()
    own.scored = lambda rollout: scored(own, rollout)
    masks = {name: torch.rand(p.shape) < density for name, p in own.named_parameters()}
    optimizer = MaskedAdamW(own.named_parameters(), masks=masks, lr=0.05)
    return own, optimizer, OwnWeights(own, optimizer, ema, TEXT, 3)


def step(own, optimizer, teacher):
    for param in own.parameters():
        param.grad = torch.randn(param.shape).to(param.dtype)
    optimizer.step()
    teacher.after_step()


def rollout(teacher_context=None):
    entries = [Entry("1+1=", teacher_context=teacher_context), Entry("12+13=", teacher_context=teacher_context)]
    return beside(encode(TEXT, entries, 32), [[4, 1], [5, 6, 7]], [True, False], True, 0, torch.device("cpu"))


def weights(own):
    return {name: p.detach().clone() for name, p in own.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_weights_are_swapped_in_and_out_bit_for_bit(dtype):
    own, optimizer, teacher = setup(1.0, dtype)
    start, (hidden, head) = weights(own), teacher.score(rollout())
    for _ in range(3):
        step(own, optimizer, teacher)
    trained = weights(own)
    again, again_head = teacher.score(rollout())
    assert torch.equal(again, hidden)
    assert torch.equal(again_head.weight, head.weight)
    assert torch.equal(again_head.weight, start["lm_head.weight"])
    assert all(torch.equal(p, trained[name]) for name, p in own.named_parameters())
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])


def test_weights_are_put_back_when_scoring_fails():
    own, optimizer, teacher = setup(1.0)
    step(own, optimizer, teacher)
    trained = weights(own)

    def fails(rollout):
        raise RuntimeError("out of memory")

    own.scored = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher.score(rollout())
    assert all(torch.equal(p, trained[name]) for name, p in own.named_parameters())


def test_the_average_is_that_of_plain_tensors():
    own, optimizer, teacher = setup(0.9, torch.float32)
    expected = weights(own)
    for _ in range(4):
        step(own, optimizer, teacher)
        for name, value in weights(own).items():
            expected[name] = 0.9 * expected[name] + 0.1 * value
    with teacher.swapped():
        for name, value in own.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_state_is_all_that_a_teacher_needs_to_go_on():
    own, optimizer, teacher = setup(0.5)
    for _ in range(3):
        step(own, optimizer, teacher)
    other = OwnWeights(own, optimizer, 0.5, TEXT, 3)
    other.load_state_dict(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.values, teacher.values, strict=True))


def test_what_is_privileged_comes_before_the_same_completion():
    own, _, teacher = setup(1.0)
    hidden, _ = teacher.score(rollout("9+9=18\n"))
    direct = beside(
        encode(TEXT, [Entry("9+9=18\n1+1="), Entry("9+9=18\n12+13=")], 64),
        [[4, 1], [5, 6, 7]],
        [True, False],
        True,
        0,
        torch.device("cpu"),
    )
    assert torch.equal(hidden, scored(own, direct)[0])
    assert hidden.shape == teacher.score(rollout())[0].shape
    assert not torch.equal(hidden, teacher.score(rollout())[0])


def test_what_is_privileged_must_find_places_in_the_student():
    _, _, teacher = setup(1.0)  # of 64 positions
    teacher.score(rollout("1" * (64 - 3 - len("12+13="))))
    with pytest.raises(
        InputError,
        match=r"the prompt '12\+13=' is 62 tokens with its `teacher_context`, and the student has 61 positions beside a completion; shorten it",
    ):
        teacher.score(rollout("1" * (65 - 3 - len("12+13="))))
