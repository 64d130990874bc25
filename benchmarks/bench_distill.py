"""The training loop next to TRL's DistillationTrainer: on-policy reverse KL with the same models, prompts and lengths.

Each runs in a separate process, in turn. Also fractions of a step's time and, for a real vocabulary, what full logits
cost.

    python benchmarks/run.py benchmarks/bench_distill.py --trl-python PYTHON

PYTHON needs trl, and the dependencies of opdkernels[distill].
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from opdkernels.distillation.options import demo_options

ROUNDS = 3


def prompts(path: Path, shots: str, count: int = 4000) -> Path:
    drawn = random.Random(0)
    rows = ({"prompt": f"{shots}{drawn.randrange(10, 100)}+{drawn.randrange(10, 100)}="} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def models(folder: Path) -> tuple[Path, Path]:
    """A student and a teacher of random weights with Qwen's vocabulary, and the tokenizer of the models that ship."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # type: ignore[import-not-found]

    for seed, (name, width) in enumerate((("student", 256), ("teacher", 384))):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(demo_options()["student"]).save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


@pytest.mark.parametrize(
    ("kind", "steps", "batch", "new_tokens"), [("characters", 40, 128, 4), ("vocabulary", 5, 16, 16)]
)
def test_loop_against_trl(benchmark, row, request, tmp_path, kind, steps, batch, new_tokens):
    python = request.config.getoption("--trl-python")
    if not python:
        pytest.skip("give --trl-python PYTHON to measure against TRL")
    student, teacher = (
        models(tmp_path) if kind == "vocabulary" else (demo_options()["student"], demo_options()["teacher"])
    )
    data = prompts(tmp_path / "prompts.jsonl", "12+13=25\n41+29=70\n" if kind == "vocabulary" else "")
    command = [python, str(Path(__file__).with_name("distill_stage.py"))]
    arguments = [
        str(part) for part in (student, teacher, data, steps, batch, new_tokens, "float32", torch.get_num_threads())
    ]
    result: dict[str, list[dict[str, float]]] = {"loop": [], "trl": []}

    def both():
        for _ in range(ROUNDS):
            for which, results in result.items():
                done = subprocess.run(
                    [*command, which, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
                )
                results.append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(both, rounds=1)
    median = {
        which: {name: statistics.median(one[name] for one in results) for name in results[0]}
        for which, results in result.items()
    }
    ours, theirs = median["loop"], median["trl"]
    assert abs(ours["kl"] - theirs["kl"]) <= 0.1 * theirs["kl"]  # of other samples, after the same training
    row(
        step_s=ours["seconds"],
        trl_step_s=theirs["seconds"],
        over_trl=theirs["seconds"] / ours["seconds"],
        peak_bytes=ours["peak_bytes"],
        trl_bytes=theirs["peak_bytes"],
        overhead_percent=100 * ours["overhead"],
    )
