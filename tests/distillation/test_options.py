from __future__ import annotations

import pytest

from opdkernels.distillation.options import DistillOptions, options_from, shipped
from opdkernels.errors import InputError, UsageError

LEAST = {"student": "s", "teacher": "t", "prompts": "addition"}
RLVR = {"kl_weight": 0, "reward_weight": 1, "samples": 2, "teacher": ""}


def test_a_file_is_read_and_the_command_line_goes_before_it(tmp_path):
    (tmp_path / "c.toml").write_text('student = "s"\nteacher = "t"\nprompts = "sums"\nlr = 1e-5\nbetas = [0.9, 0.95]\n')
    chosen = options_from(tmp_path / "c.toml", {"lr": "2e-6", "steps": "7"})
    assert (chosen.lr, chosen.steps, chosen.betas, chosen.prompts) == (2e-6, 7, (0.9, 0.95), "sums")


def test_betas_of_a_command_line_have_a_comma():
    assert options_from(None, {**LEAST, "betas": "0.8,0.9"}).betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"learning_rate": "1"}, "no option 'learning_rate'"),
        ({"batchsize": 3}, "did you mean batch_size?"),
        ({"lr": "fast"}, "option lr is 'fast'"),
        ({"lr": 0}, "option lr is 0"),
        ({"divergence": "k1"}, "no expected gradient"),
        ({"divergence": "k3"}, "forward KL"),
        ({"divergence": "topk_reverse_kl"}, "k"),
        ({"kl_weight": 0, "teacher": ""}, "nothing is trained"),
        ({"teacher": ""}, "there is no teacher"),
        ({"reward_weight": 1}, "take 2 or more"),
        ({"reward_weight": 1, "samples": 2, "on_policy": 0.5}, "set on_policy=1"),
        ({"masks": "m", "lora_rank": 4}, "choose one"),
        ({"sft_weight": 1}, "set on_policy below 1"),
        ({"divergence": "sampled_reverse_kl", "on_policy": 0.5}, "own distribution alone"),
        ({"divergence": "sampled_reverse_kl", "sampling_temperature": 0.5}, "own distribution alone"),
        ({"reward_weight": 1, "samples": 2, "sampling_temperature": 0.5}, "set sampling_temperature=1"),
        ({"ema": 0.9}, "ema would change nothing: it is of teacher=self; leave it out"),
        ({"teacher": "self", "beta": 0.3}, "beta would change nothing: it is of the divergence jsd"),
        ({"optimizer": "sgd", "eps": 1e-6}, "eps would change nothing"),
        ({"optimizer": "sgd", "betas": "0.8,0.9"}, "betas would change nothing"),
        ({"momentum": 0.5}, "momentum would change nothing: it is of the optimizer sgd"),
        ({"dtype": "float32", "precision": "nearest"}, "precision would change nothing: it is of weights in bfloat16"),
        ({"subspace": "x"}, "subspace would change nothing: it is of lora_rank"),
        ({"kl_weight": 0, "reward_weight": 1, "samples": 2}, "teacher would change nothing"),
        (
            {"kl_weight": 0, "sft_weight": 1, "on_policy": 0.5},
            "on_policy is 0.5: steps on its own would train nothing; set on_policy=0",
        ),
        ({"teacher": "a=x,b=z,a=y"}, "the tag a twice; give each tag once"),
        ({"held_out": "h"}, "held_out would change nothing: it is of evaluations, and eval_size is 0"),
        ({"eval_every": 1}, "eval_every would change nothing"),
        ({"reward": "m:f"}, "reward would change nothing"),
        ({"lora_rank": 4, "precision": "nearest"}, "precision would change nothing"),
        *(
            ({**RLVR, name: value}, f"{name} would change nothing")
            for name, value in (("divergence", "jsd"), ("k", 3), ("temperature", 0.5))
        ),
        *(
            ({"betas": value}, f"option betas is {value!r}: give two numbers, such as 0.9,0.999")
            for value in ("0.9", "0.9,0.99,0.999", "", 0.9, [0.9])
        ),
        ({"betas": "0.9,x"}, "option betas is 'x'"),
        ({"device": "gpu"}, "give cpu, cuda or cuda:1"),
        ({"optimizer": "adam"}, "option optimizer is 'adam'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(given, says):
    with pytest.raises(UsageError) as caught:
        options_from(None, {**LEAST, **given})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_count_are_taken():
    for given in (
        {**RLVR, "reward": "m:f"},
        {"eval_size": 1, "reward": "m:f", "held_out": "h", "eval_every": 1},
        {"divergence": "jsd", "beta": 0.1, "k": 3, "temperature": 0.5},
    ):
        made = options_from(None, {**LEAST, **given})
        assert {name: getattr(made, name) for name in given} == given


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="there is no prompts; give it in the configuration or as --prompts"):
        options_from(None, {"student": "s"})


def test_files_that_are_not_toml_are_named(tmp_path):
    (tmp_path / "c.toml").write_text("student: s")
    with pytest.raises(InputError, match=r"c\.toml is not TOML"):
        options_from(tmp_path / "c.toml", {})
    (tmp_path / "e.toml").mkdir()
    with pytest.raises(InputError, match=r"e\.toml cannot be read \(Is a directory\); give a TOML file of options"):
        options_from(tmp_path / "e.toml", {})
    with pytest.raises(InputError, match=r"d\.toml does not exist"):
        options_from(tmp_path / "d.toml", {})


def test_every_field_is_explained_by_help():
    from typer.testing import CliRunner

    from opdkernels.cli import app

    for command in ("distill", "experiment"):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for name, field in DistillOptions.model_fields.items():
            assert f"--{name.replace('_', '-')}" in text
            assert field.description


def test_help_says_what_an_experiment_takes_without_a_configuration():
    from typer.testing import CliRunner

    from opdkernels.cli import app, shown

    own, other = (
        " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output.split())
        for command in ("experiment", "distill")
    )
    for name, value in shipped().items():
        told = "the one that ships" if name in ("student", "teacher") else shown(value)
        start = own.index(f"--{name.replace('_', '-')} VALUE")
        assert f"without a configuration: {told}]" in own[start : own.index(" --", start + 1)]
    assert "[default: 16; without a configuration: 128]" in own
    assert "without a configuration" not in other


def test_teachers_are_chosen_by_tag():
    chosen = options_from(None, {**LEAST, "teacher": "math = a/b, code=c"})
    assert chosen.teachers == {"math": "a/b", "code": "c"}
    assert options_from(None, LEAST).teachers == {"": "t"}
    assert options_from(None, {**LEAST, "teacher": "m/lr=1/x"}).teachers == {"": "m/lr=1/x"}
