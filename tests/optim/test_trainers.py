"""Real trainers on a tiny model: each trains, frozen coordinates keep their bits, and a resumed run is the unbroken one
bit for bit.

They run where the libraries are installed: `make trainers`.
"""

from __future__ import annotations

import os

import pytest
import torch

from opdkernels.optim import (
    MaskedAdamW,
    MaskedSGD,
    gather_active_grads,
    in_model_order,
    optimizer_cls_and_kwargs,
    zero_frozen_grads,
)
from tests.tiny_llama import tiny_llama, word_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed; `make trainers` installs it")
pytestmark = pytest.mark.slow
STEPS = 6


def tiny_model(dtype=torch.bfloat16):
    return tiny_llama(64, 32, 48, num_layers=2, dtype=dtype)


def masks_for(model):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(p.shape, generator=generator) < 0.2 for name, p in model.named_parameters()}


def examples(count=48):
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": row, "labels": row} for row in torch.randint(3, 64, (count, 16), generator=generator).tolist()
    ]


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def bits_of(model):
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def check(before, masks, unbroken, resumed) -> None:
    moved = 0
    for name, mask in masks.items():
        assert torch.equal(unbroken[name][~mask], before[name][~mask])
        assert torch.equal(unbroken[name], resumed[name])
        moved += int((unbroken[name][mask] != before[name][mask]).sum())
    assert moved


@pytest.mark.parametrize("cls", [MaskedAdamW, MaskedSGD])
def test_hugging_face_trainer(tmp_path, cls):
    def run(folder, resume=None):
        model = tiny_model()
        masks, before = masks_for(model), bits_of(model)
        args = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            seed=3,
            disable_tqdm=True,
            max_grad_norm=1.0,
        )
        arguments = optimizer_cls_and_kwargs(model, masks, args, cls=cls)
        trainer = transformers.Trainer(
            model, args, data_collator=collate, train_dataset=examples(), optimizer_cls_and_kwargs=arguments
        )
        trainer.train(resume_from_checkpoint=resume)
        assert all(group.get("param_names") for group in trainer.optimizer.param_groups)
        return before, masks, bits_of(model)

    before, masks, unbroken = run(tmp_path)
    _, _, resumed = run(tmp_path / "again", str(tmp_path / "checkpoint-3"))
    check(before, masks, unbroken, resumed)


def test_hugging_face_trainer_clips_gathered_gradients(tmp_path):
    """Its log of the norm and its clipping are those of the active gradients, as with zero_frozen_grads."""

    def run(install, folder):
        model = tiny_model(torch.float32)
        masks = masks_for(model)
        args = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            seed=3,
            disable_tqdm=True,
            max_grad_norm=0.01,
        )
        cls, options = optimizer_cls_and_kwargs(model, masks, args, cls=MaskedSGD)  # its step depends on the scale
        optimizer = cls(**options)
        install(model, optimizer)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = transformers.Trainer(
            model, args, data_collator=collate, train_dataset=examples(), optimizers=(optimizer, schedule)
        )
        trainer.train()
        return bits_of(model), [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]

    gathered, gathered_norms = run(gather_active_grads, tmp_path / "a")
    zeroed, zeroed_norms = run(zero_frozen_grads, tmp_path / "b")
    assert len(gathered_norms) == STEPS
    assert min(gathered_norms) > 0.01
    assert gathered_norms == pytest.approx(zeroed_norms, rel=1e-4)
    for name, weight in gathered.items():
        torch.testing.assert_close(weight, zeroed[name], rtol=1e-5, atol=1e-7)


def test_trl_supervised_fine_tuning(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed; `make trainers` installs it")
    datasets = pytest.importorskip("datasets")
    tokenizer = word_tokenizer(64)
    texts = [{"text": " ".join(f"w{i}" for i in row["input_ids"])} for row in examples()]

    def run(folder, resume=None):
        model = tiny_model()
        masks, before = masks_for(model), bits_of(model)
        args = trl.SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            seed=3,
            disable_tqdm=True,
            max_length=32,
            bf16=False,
        )
        arguments = optimizer_cls_and_kwargs(model, masks, args)
        trainer = trl.SFTTrainer(
            model,
            args,
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return before, masks, bits_of(model)

    before, masks, unbroken = run(tmp_path)
    _, _, resumed = run(tmp_path / "again", str(tmp_path / "checkpoint-3"))
    check(before, masks, unbroken, resumed)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed; `make trainers` installs it")

    def run(first, load=None, save=None):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny_model()
        masks, before = masks_for(model), bits_of(model)
        optimizer = MaskedAdamW(model.named_parameters(), masks=masks, lr=1e-2)
        loader = torch.utils.data.DataLoader(examples(), batch_size=4, collate_fn=collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if load:
            accelerator.load_state(load)
        for step, batch in enumerate(loader):
            if not first <= step < STEPS:
                continue
            if save and step == 3:
                accelerator.save_state(save)
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return before, masks, bits_of(accelerator.unwrap_model(model))

    before, masks, unbroken = run(0, save=str(tmp_path / "state"))
    _, _, resumed = run(3, load=str(tmp_path / "state"))
    check(before, masks, unbroken, resumed)


@pytest.mark.parametrize("masked_clip", [False, True])
def test_lightning(tmp_path, masked_clip):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed; `make trainers` installs it")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()
            self.masks = masks_for(self.model)

        def training_step(self, batch, _):
            return self.model(**batch).loss

        def configure_optimizers(self):
            optimizer = MaskedAdamW(self.model.named_parameters(), masks=self.masks, lr=1e-2)
            if masked_clip:
                zero_frozen_grads(self.model, optimizer)
            return optimizer

    def run(folder, resume=None):
        module = Module()
        before = bits_of(module.model)
        loader = torch.utils.data.DataLoader(
            examples(4), batch_size=4, collate_fn=collate
        )  # one batch an epoch: it resumes at the first
        saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=10,
            gradient_clip_val=1.0,
            logger=False,
            callbacks=[saving],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        trainer.fit(module, loader, ckpt_path=resume, weights_only=False)
        return before, module.masks, bits_of(module.model)

    before, masks, unbroken = run(tmp_path)
    _, _, resumed = run(tmp_path / "again", str(tmp_path / "step=5.ckpt"))
    check(before, masks, unbroken, resumed)


def test_verl(tmp_path):
    optimizers = pytest.importorskip(
        "verl.workers.config.optimizer", reason="verl is not installed; `make trainers` installs it"
    )

    def run(first, load=None):
        model = tiny_model()
        masks, before = masks_for(model), bits_of(model)
        in_model_order(masks, model).save(tmp_path / "masks.safetensors")
        config = optimizers.FSDPOptimizerConfig(
            optimizer="MaskedAdamW",
            optimizer_impl="opdkernels.optim",
            lr=1e-2,
            weight_decay=0.1,
            betas=[0.9, 0.95],
            override_optimizer_config={"masks": str(tmp_path / "masks.safetensors"), "eps": 1e-8},
        )
        optimizer = optimizers.build_optimizer(model.parameters(), config)
        if load:
            saved = torch.load(load, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        rows = examples()
        for step in range(first, STEPS):
            if step == 3 and not load:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
            model(**collate(rows[4 * step : 4 * step + 4])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return before, masks, bits_of(model)

    before, masks, unbroken = run(0)
    _, _, resumed = run(3, tmp_path / "state.pt")
    check(before, masks, unbroken, resumed)
