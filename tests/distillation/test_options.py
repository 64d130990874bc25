from __future__ import annotations

import pytest

from opdkernels.distillation.options import DistillOptions, demo_options, options_from
from opdkernels.errors import InputError, UsageError

LEAST = {"student": "s", "teacher": "t", "prompts": "addition"}
RLVR = {"divergence_weight": 0, "reward_weight": 1, "num_generations": 2, "teacher": ""}


def test_command_line_overrides_toml(tmp_path):
    (tmp_path / "c.toml").write_text(
        'student = "s"\nteacher = "t"\nprompts = "sums"\nlearning_rate = 1e-5\nbetas = [0.9, 0.95]\n'
    )
    chosen = options_from(tmp_path / "c.toml", {"learning_rate": "2e-6", "max_steps": "7"})
    assert (chosen.learning_rate, chosen.max_steps, chosen.betas, chosen.prompts) == (2e-6, 7, (0.9, 0.95), "sums")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'student = "s"\nstudent = "t"\n', r"c\.toml is not TOML .*line 2"),
        (b"[optimizer]\nlearning_rate = 1\n", "option optimizer is"),
        (b'student = "s\xff"', "is not TOML"),
        ('student = "s"'.encode("utf-16"), "is not TOML"),
    ],
)
def test_invalid_toml_is_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises((InputError, UsageError), match=says) as caught:
        options_from(tmp_path / "c.toml", {**LEAST})
    assert "\n" not in str(caught.value)


def test_toml_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.toml").write_bytes(b'\xef\xbb\xbfstudent = "s"\r\nteacher = "t"\r\nprompts = "sums"\r\n')
    assert options_from(tmp_path / "c.toml", {}).prompts == "sums"


def test_betas_parse_from_text():
    assert options_from(None, {**LEAST, "betas": "0.8,0.9"}).betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": "1"}, "no option 'lr'"),
        ({"batchsize": 3}, "did you mean batch_size?"),
        ({"learning_rate": "fast"}, "option learning_rate is 'fast'"),
        ({"learning_rate": 0}, "option learning_rate is 0"),
        ({"learning_rate": float("inf")}, "option learning_rate is inf: Input should be a finite number"),
        ({"max_steps": True}, "option max_steps is True: give a number"),
        ({"max_steps": 7.5}, "option max_steps is 7.5"),
        ({"threads": True}, "option threads is True: give a number"),
        ({"betas": [0.9, 1.0]}, "option betas is 1.0"),
        ({"betas": "nan,0.9"}, "option betas is 'nan'"),
        ({"student": 3}, "option student is 3"),
        ({"masks": ["m"]}, "option masks is"),
        ({"divergence": "k1"}, "its expected gradient is 0"),
        ({"divergence": "k3"}, "forward KL"),
        ({"divergence": "topk_reverse_kl"}, "k"),
        ({"divergence_weight": 0, "teacher": ""}, "nothing is trained"),
        ({"teacher": ""}, "there is no teacher"),
        ({"reward_weight": 1}, "set num_generations to 2 or more"),
        ({"reward_weight": 1, "num_generations": 2, "on_policy_fraction": 0.5}, "set on_policy_fraction=1"),
        ({"masks": "m", "lora_rank": 4}, "set only one of them"),
        ({"sft_weight": 1}, "set on_policy_fraction below 1"),
        ({"divergence": "sampled_reverse_kl", "on_policy_fraction": 0.5}, "the student's own distribution"),
        ({"divergence": "sampled_reverse_kl", "sampling_temperature": 0.5}, "the student's own distribution"),
        ({"reward_weight": 1, "num_generations": 2, "sampling_temperature": 0.5}, "set sampling_temperature=1"),
        ({"ema_decay": 0.9}, "ema_decay has no effect: it applies only to teacher=self; remove it"),
        ({"teacher": "self", "beta": 0.3}, "beta has no effect: it applies only to the divergence jsd"),
        ({"optimizer": "sgd", "eps": 1e-6}, "eps has no effect"),
        ({"optimizer": "sgd", "betas": "0.8,0.9"}, "betas has no effect"),
        ({"momentum": 0.5}, "momentum has no effect: it applies only to the optimizer sgd"),
        ({"dtype": "float32", "precision": "nearest"}, "precision has no effect: it applies only to bfloat16 weights"),
        ({"subspace": "x"}, "subspace has no effect: it applies only to a lora_rank above 0"),
        ({"divergence_weight": 0, "reward_weight": 1, "num_generations": 2}, "teacher has no effect"),
        (
            {"divergence_weight": 0, "sft_weight": 1, "on_policy_fraction": 0.5},
            "on_policy_fraction is 0.5: on-policy steps would train nothing; set on_policy_fraction=0",
        ),
        ({"teacher": "a=x,b=z,a=y"}, "the teacher_id a twice; give each teacher_id once"),
        (
            {"eval_prompts": "h"},
            "eval_prompts has no effect: it applies only to evaluations, and num_eval_prompts is 0",
        ),
        ({"eval_steps": 1}, "eval_steps has no effect"),
        ({"reward": "m:f"}, "reward has no effect"),
        ({"lora_rank": 4, "precision": "nearest"}, "precision has no effect"),
        *(
            ({**RLVR, name: value}, f"{name} has no effect")
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
def test_invalid_options_raise_one_line_error(given, says):
    with pytest.raises(UsageError) as caught:
        options_from(None, {**LEAST, **given})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_effective_options_are_accepted():
    for given in (
        {**RLVR, "reward": "m:f"},
        {"num_eval_prompts": 1, "reward": "m:f", "eval_prompts": "h", "eval_steps": 1},
        {"divergence": "jsd", "beta": 0.1, "k": 3, "temperature": 0.5},
    ):
        made = options_from(None, {**LEAST, **given})
        assert {name: getattr(made, name) for name in given} == given


def test_missing_option_is_named():
    with pytest.raises(UsageError, match="there is no prompts; set it in the configuration or as --prompts"):
        options_from(None, {"student": "s"})


def test_unreadable_toml_is_named(tmp_path):
    (tmp_path / "c.toml").write_text("student: s")
    with pytest.raises(InputError, match=r"c\.toml is not TOML"):
        options_from(tmp_path / "c.toml", {})
    (tmp_path / "e.toml").mkdir()
    with pytest.raises(InputError, match=r"e\.toml is not a regular file; give a TOML file of options"):
        options_from(tmp_path / "e.toml", {})
    with pytest.raises(InputError, match=r"d\.toml does not exist"):
        options_from(tmp_path / "d.toml", {})


def test_help_lists_every_field():
    from typer.testing import CliRunner

    from opdkernels.cli import app

    for command in ("distill", "experiment"):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for name, field in DistillOptions.model_fields.items():
            assert f"--{name.replace('_', '-')}" in text
            assert field.description


def test_help_shows_experiment_defaults():
    from typer.main import get_command

    from opdkernels.cli import app
    from opdkernels.cli.options import text_of

    experiment, distill = (
        {option.name: option for option in get_command(app).commands[command].params}
        for command in ("experiment", "distill")
    )
    for name, value in demo_options().items():
        expected = "the one in this package" if name in ("student", "teacher") else text_of(value)
        assert experiment[name].help.endswith(f" Without a configuration file: {expected}.")
        assert "configuration file" not in distill[name].help
    assert experiment["batch_size"].default == distill["batch_size"].default == "16"


def test_teacher_option_parses_teacher_ids():
    chosen = options_from(None, {**LEAST, "teacher": "math = a/b, code=c"})
    assert chosen.teachers == {"math": "a/b", "code": "c"}
    assert options_from(None, LEAST).teachers == {"": "t"}
    assert options_from(None, {**LEAST, "teacher": "m/lr=1/x"}).teachers == {"": "m/lr=1/x"}
