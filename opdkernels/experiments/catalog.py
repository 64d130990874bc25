"""The experiments: their questions and arms."""

from __future__ import annotations

from opdkernels.experiments.arms import (
    Arm,
    Experiment,
    UpdateSlice,
    changed,
    magnitude_matched,
    near_zero,
    principal,
    random,
)

RLVR = {
    "divergence_weight": 0.0,
    "reward_weight": 1.0,
    "teacher": "",
    "ema_decay": 1.0,
    "num_generations": 4,
    "divergence": "reverse_kl",
    "beta": 0.5,
    "k": 0,
    "temperature": 1.0,
}
ADAMW = {"optimizer": "adamw", "momentum": 0.0}
SGD = {"optimizer": "sgd", "betas": (0.9, 0.999), "eps": 1e-8}
BF16 = {"dtype": "bfloat16", "precision": "split_master"}
FULL = Arm("full")
MATCHED = "magnitude-matched"
LORA = "lora rank 8"
EXPERIMENTS = {
    "masks": Experiment(
        "Does training only the coordinates that a full run changed retain its gain? Does the set matter, or only its "
        "size and its magnitudes?",
        [
            FULL,
            Arm("changed", mask=changed),
            Arm("random", mask=random),
            Arm(MATCHED, mask=magnitude_matched),
            Arm("near zero", mask=near_zero),
            Arm("early-changed", mask=changed, at=0.1),
            Arm("rlvr", RLVR),
            Arm("changed by rlvr", mask=changed, of="rlvr"),
        ],
    ),
    "sgd": Experiment(
        "Is AdamW needed, or does SGD at its best learning rate do as well?",
        [
            *(Arm(f"adamw lr x {k}", {**ADAMW, "learning_rate": k}) for k in (0.3, 1.0, 3.0, 10.0)),
            *(Arm(f"sgd lr {lr}", {**SGD, "learning_rate": lr}) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
        ],
        reference_arm="adamw lr x 1.0",
    ),
    "on-policy": Experiment(
        "Do on-policy samples make the update sparse?",
        [Arm(f"on-policy {share}", {"on_policy_fraction": share}) for share in (0.0, 0.25, 0.5, 1.0)],
        reference_arm="on-policy 1.0",
    ),
    "precision": Experiment(
        "How much of the sparsity is rounding? bf16 weights with an fp32 split master, bf16 rounded at each step, and "
        "fp32, with the change expected from bf16 rounding alone for updates of that norm.",
        [
            Arm("bf16 split-master", BF16),
            Arm("bf16 nearest", {**BF16, "precision": "nearest"}),
            Arm("fp32", {"dtype": "float32", "precision": "split_master"}),
        ],
        reference_arm="bf16 split-master",
        null=True,
    ),
    "trajectory": Experiment(
        "When is the mask known? The largest changes after a fraction of a full run's steps: their recall of the final "
        "set, and the gain that training only them retains.",
        [
            FULL,
            *(Arm(f"mask at {share:.0%} of the steps", mask=changed, at=share) for share in (0.1, 0.2, 0.5)),
            Arm("changed", mask=changed),
            Arm(MATCHED, mask=magnitude_matched),
        ],
        density=0.2,
    ),
    "subspace": Experiment(
        "LoRA, and LoRA in the subspace of the early update, against masks with as many trained parameters as LoRA.",
        [
            FULL,
            *(
                Arm(f"{LORA} lr x {k}", {"lora_rank": 8, "precision": "split_master", "learning_rate": k})
                for k in (3.0, 10.0, 30.0)
            ),
            *(
                Arm(
                    f"early subspace rank 16 lr x {k}",
                    {"lora_rank": 16, "precision": "split_master", "learning_rate": k},
                    subspace=True,
                    at=0.2,
                )
                for k in (3.0, 10.0, 30.0)
            ),
            *(
                Arm(f"early-changed lr x {k}", {"learning_rate": k}, mask=changed, at=0.2, size_of=f"{LORA} lr x 3.0")
                for k in (1.0, 3.0, 10.0)
            ),
            *(
                Arm(f"changed lr x {k}", {"learning_rate": k}, mask=changed, size_of=f"{LORA} lr x 3.0")
                for k in (1.0, 3.0, 10.0)
            ),
            *(
                Arm(f"random lr x {k}", {"learning_rate": k}, mask=random, size_of=f"{LORA} lr x 3.0")
                for k in (1.0, 3.0, 10.0)
            ),
        ],
    ),
    "grafts": Experiment(
        "Which part of the update carries the gain? The start of a full run plus a part of its update, or its end "
        "without that part.",
        [
            FULL,
            Arm("largest alone", part=UpdateSlice(changed)),
            Arm("all but the largest", part=UpdateSlice(changed, invert=True)),
            Arm("random alone", part=UpdateSlice(random)),
            Arm("magnitude-matched alone", part=UpdateSlice(magnitude_matched)),
            Arm("near zero alone", part=UpdateSlice(near_zero)),
            Arm("principal alone", part=UpdateSlice(principal)),
            *(Arm(f"{block} alone", part=UpdateSlice(select=block)) for block in ("attention", "mlp")),
            *(
                Arm(f"without {block}", part=UpdateSlice(select=block, invert=True))
                for block in ("attention", "mlp", "embedding", "lm_head", "norm")
            ),
            *(
                Arm(f"without the {third} third of layers", part=UpdateSlice(third=i, invert=True))
                for i, third in enumerate(("first", "middle", "last"))
            ),
        ],
        density=0.2,
    ),
}
