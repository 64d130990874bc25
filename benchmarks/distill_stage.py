"""Trains a student on its own samples by reverse KL, with this package's loop or TRL's DistillationTrainer.

Prints the seconds per step (median without the first two), the peak of memory in bytes, and the KL at the end.

    python benchmarks/distill_stage.py loop|trl STUDENT TEACHER PROMPTS.jsonl STEPS BATCH NEW_TOKENS DTYPE THREADS
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

LEARNING_RATE = 1e-5


def loop(
    student: str,
    teacher: str,
    prompts: str,
    steps: int,
    batch: int,
    new_tokens: int,
    dtype: str,
    threads: int,
    out: str,
) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from opdkernels.distillation.loop import train
    from opdkernels.distillation.options import options_from

    arguments = {
        "student": student,
        "teacher": teacher,
        "prompts": prompts,
        "max_steps": steps,
        "batch_size": batch,
        "max_completion_length": new_tokens,
        "dtype": dtype,
        "learning_rate": LEARNING_RATE,
        "snapshot_every": 0,
        "threads": threads,
        "device": "cpu",
    }
    train(options_from(None, arguments), out)
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    # steps with their logging, without the checkpoints at both ends
    seconds = [row["seconds"]["all"] - row["seconds"].get("save", 0) for row in rows]
    spent = [sum(row["seconds"][name] for name in ("generate", "score", "train", "step")) for row in rows]
    return {
        "seconds": statistics.median(seconds[2:]),
        "overhead": 1 - sum(spent[2:]) / sum(seconds[2:]),
        "kl": statistics.mean(row["reverse_kl"] for row in rows[-3:]),
    }


def trl(
    student: str,
    teacher: str,
    prompts: str,
    steps: int,
    batch: int,
    new_tokens: int,
    dtype: str,
    threads: int,
    out: str,
) -> dict[str, float]:
    import transformers
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Steps(transformers.TrainerCallback):
        def __init__(self):
            self.at: list[float] = []

        def on_step_end(self, args, state, control, **more):
            self.at.append(time.perf_counter())

    rows = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
    kinds = {"dtype": dtype}
    args = DistillationConfig(
        out,
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_completion_length=new_tokens,
        learning_rate=LEARNING_RATE,
        beta=1.0,
        temperature=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        model_init_kwargs=kinds,
        teacher_model_init_kwargs=kinds,
    )
    clock = Steps()
    trainer = DistillationTrainer(
        student,
        teacher,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=transformers.AutoTokenizer.from_pretrained(student),
        callbacks=[clock],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": statistics.median(b - a for a, b in zip(clock.at[1:], clock.at[2:], strict=False)),
        "kl": statistics.mean(losses[-3:]),
    }


def main() -> None:
    which, student, teacher, prompts, steps, batch, new_tokens, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as out:
        metrics = {"loop": loop, "trl": trl}[which](
            student, teacher, prompts, int(steps), int(batch), int(new_tokens), dtype, int(threads), out
        )
    print(json.dumps({**metrics, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


main()
