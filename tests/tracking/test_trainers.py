"""UpdateTracker in the trainers of other libraries: what their logs contain, and when."""

from __future__ import annotations

import os
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

from opdkernels import UpdateTracker, UsageError
from opdkernels.tracking import tracker as tracker_module
from tests.tiny_llama import tiny_llama, word_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
NAMES = {
    "opdkernels/changed_visible",
    "opdkernels/changed_any",
    "opdkernels/recall_vs_changed_any",
    "opdkernels/update_norm",
    "opdkernels/relative_norm",
    "opdkernels/tracker_seconds",
}
MASK_NAMES = {"opdkernels/mask_recall", "opdkernels/mask_precision"}


class TinyModel(torch.nn.Module):
    """Two layers and a loss, as Trainer calls them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Linear(8, 16)
        self.out = torch.nn.Linear(16, 1)

    def forward(self, x, labels=None):
        loss = (self.out(torch.tanh(self.hidden(x))).squeeze(-1) - x.sum(-1)).square().mean()
        return {"loss": loss}


def rows(count=64):
    generator = torch.Generator().manual_seed(1)
    return [{"x": x} for x in torch.randn(count, 8, generator=generator)]


def hidden_masks():
    return {"hidden.weight": torch.ones(16, 8, dtype=torch.bool)}


@pytest.fixture
def make_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def make(cls=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        args = transformers.TrainingArguments(**(defaults | options))
        return (cls or transformers.Trainer)(TinyModel(), args, train_dataset=rows())

    return make


def logged(trainer) -> dict[int, dict]:
    """What the tracker logged, by step."""
    entries = [entry for entry in trainer.state.log_history if "opdkernels/changed_visible" in entry]
    assert len({entry["step"] for entry in entries}) == len(entries)
    return {entry["step"]: entry for entry in entries}


def test_hugging_face_trainer_logs_with_its_own_log(make_trainer):
    from transformers import TrainerCallback

    received = []

    class Receiver(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            received.append((state.global_step, dict(logs)))

    trainer = make_trainer()
    trainer.add_callback(Receiver)
    start = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.add_callback(UpdateTracker(trainer, masks=hidden_masks()))
    trainer.train()
    entries = logged(trainer)
    assert list(entries) == [2, 4, 6]
    assert entries[6].keys() == NAMES | MASK_NAMES | {"epoch", "step"}
    flags = {name: param.bfloat16() != start[name].bfloat16() for name, param in trainer.model.named_parameters()}
    total = sum(flag.numel() for flag in flags.values())
    assert entries[6]["opdkernels/changed_visible"] == sum(int(flag.sum()) for flag in flags.values()) / total > 0
    assert entries[6]["opdkernels/mask_recall"] == int(flags["hidden.weight"].sum()) / (16 * 8)
    by_step = {step: logs for step, logs in received if logs.keys() >= NAMES}
    assert list(by_step) == [2, 4, 6]
    assert by_step[4]["opdkernels/update_norm"] == entries[4]["opdkernels/update_norm"]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 6]


@pytest.mark.parametrize(("options", "every", "steps"), [
    ({}, 3, [3, 6]),
    ({"logging_steps": 4}, None, [4, 6]),  # and at the end
    ({"max_steps": -1, "num_train_epochs": 1, "logging_strategy": "epoch"}, None, [16]),
    ({"gradient_accumulation_steps": 2}, 2, [2, 4, 6]),
])  # fmt: skip
def test_steps_are_those_of_the_log_or_a_number(make_trainer, options, every, steps):
    trainer = make_trainer(**options)
    trainer.add_callback(UpdateTracker(trainer, logging_steps=every))
    trainer.train()
    assert list(logged(trainer)) == steps


def test_training_is_the_same_with_a_tracker(make_trainer):
    plain, tracked = make_trainer(), make_trainer()
    tracked.add_callback(UpdateTracker(tracked, logging_steps=1))
    for trainer in (plain, tracked):
        trainer.train()
    for a, b in zip(plain.model.parameters(), tracked.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trainer_that_adds_its_means_to_each_log_keeps_them(make_trainer):
    """As those of TRL: a log in between would cut the interval of their means."""
    from transformers import Trainer

    class MeanTrainer(Trainer):
        seen = 0

        def training_step(self, *args, **kwargs):
            self.seen += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, start_time=None):
            super().log(logs | {"steps_since_log": self.seen}, start_time)
            self.seen = 0

    trainer = make_trainer(MeanTrainer, logging_steps=3)
    trainer.add_callback(UpdateTracker(trainer, logging_steps=1))
    trainer.train()
    assert [e["steps_since_log"] for e in trainer.state.log_history if "loss" in e] == [3, 3]
    assert list(logged(trainer)) == [1, 2, 3, 4, 5, 6]


def test_a_tracker_without_its_trainer_is_an_error(make_trainer):
    from transformers import Trainer

    with pytest.raises(UsageError, match=r"trainer\.add_callback\(UpdateTracker\(trainer\)\)"):
        Trainer(TinyModel(), make_trainer().args, callbacks=[UpdateTracker()])
    with pytest.raises(UsageError, match="trainer is a TinyModel; give a Trainer"):
        UpdateTracker(TinyModel())


def test_a_resumed_training_warns_without_base(make_trainer, tmp_path):
    from safetensors.torch import save_file

    first = make_trainer(save_strategy="steps", save_steps=4)
    save_file(dict(first.model.state_dict()), tmp_path / "base.safetensors")
    tracker = UpdateTracker(first)
    first.add_callback(tracker)
    first.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    resumed = make_trainer()
    resumed.add_callback(UpdateTracker(resumed, base=tmp_path / "base.safetensors"))
    resumed.train(resume_from_checkpoint=checkpoint)
    for name in ("opdkernels/changed_visible", "opdkernels/update_norm"):
        assert logged(resumed)[6][name] == logged(first)[6][name]
    warned = make_trainer()
    warned.add_callback(UpdateTracker(warned))
    with pytest.warns(UserWarning, match="resumes at step 4.*give the checkpoint that the run started from as base"):
        warned.train(resume_from_checkpoint=checkpoint)
    assert logged(warned)[6]["opdkernels/update_norm"] < logged(first)[6]["opdkernels/update_norm"]


def test_lightning_hooks_log_with_the_module_and_the_loggers():
    """With objects that have what the hooks use: runs without the library."""
    model, calls, received = TinyModel(), [], []
    model.log_dict = lambda values, **options: calls.append((trainer.global_step, values, options))
    logger = SimpleNamespace(log_metrics=lambda values, step: received.append((step, values)))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, model=model, loggers=[logger, logger])
    tracker = UpdateTracker(masks=hidden_masks())
    tracker.on_train_start(trainer, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for batch_idx in range(8):  # two batches per step
        batch = torch.stack([row["x"] for row in rows(4)])
        model(batch)["loss"].backward()
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
            trainer.global_step += 1
        tracker.on_train_batch_end(trainer, model, None, batch, batch_idx)
    tracker.on_train_end(trainer, model)
    assert [step for step, _, _ in calls] == [2, 4]
    assert all(values.keys() == NAMES | MASK_NAMES for _, values, _ in calls)
    assert calls[0][1]["opdkernels/update_norm"] < calls[1][1]["opdkernels/update_norm"]
    assert calls[0][2] == {"logger": False, "on_step": True, "on_epoch": False, "rank_zero_only": True}
    assert received == [(step - 1, values) for step, values, _ in calls for _ in range(2)]


def test_a_resumed_lightning_training_warns():
    trainer = SimpleNamespace(global_step=30, log_every_n_steps=2, model=TinyModel())
    with pytest.warns(UserWarning, match="resumes at step 30"):
        UpdateTracker().on_train_start(trainer, trainer.model)


def test_trl_supervised_fine_tuning(tmp_path):
    """Its own means are over the steps since its last log, whatever the tracker logs in between."""
    trl = pytest.importorskip("trl", reason="trl is not installed; `make trainers` installs it")
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_list([{"text": f"w{3 + i % 9} w{3 + i % 7} w{3 + i % 5}"} for i in range(48)])

    def run(with_tracker):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            logging_steps=3,
            disable_tqdm=True,
            max_length=16,
            bf16=False,
            save_strategy="no",
        )
        model = tiny_llama(32, 16, 16, num_layers=1, dtype=torch.bfloat16)
        trainer = trl.SFTTrainer(model, args, train_dataset=texts, processing_class=word_tokenizer(32))
        if with_tracker:
            trainer.add_callback(UpdateTracker(trainer, logging_steps=2))
        trainer.train()
        return trainer

    plain, tracked = run(False), run(True)
    assert list(logged(tracked)) == [2, 4, 6]
    assert logged(tracked)[6].keys() == NAMES | {"epoch", "step"}
    rows = [[row for row in t.state.log_history if "loss" in row] for t in (plain, tracked)]
    assert [row["step"] for row in rows[1]] == [3, 6]
    for name in ("loss", "entropy", "num_tokens"):
        assert [row[name] for row in rows[1]] == [row[name] for row in rows[0]]


def test_callback_classes_are_those_of_loaded_libraries(monkeypatch):
    class Callback:
        def on_fit_start(self, trainer, pl_module):
            return "fit"

    for name in ("transformers", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert type(UpdateTracker()) is UpdateTracker
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=Callback))
    tracker = UpdateTracker(stride=2)
    assert isinstance(tracker, Callback)
    assert isinstance(tracker, UpdateTracker)
    assert (tracker.stride, tracker.on_fit_start(None, None)) == (2, "fit")
    assert type(tracker) is type(UpdateTracker())
    assert type(tracker).__qualname__ == "UpdateTracker"
    copy = pickle.loads(pickle.dumps(tracker))
    assert isinstance(copy, Callback)
    assert vars(copy) == vars(tracker)


def test_callbacks_of_both_libraries_have_one_method_of_the_same_name():
    """With other arguments, so that UpdateTracker defines it."""
    transformers = pytest.importorskip("transformers")
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    def hooks(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert hooks(transformers.TrainerCallback) & hooks(lightning.Callback) == {"on_train_end"}
    assert issubclass(type(UpdateTracker()), (transformers.TrainerCallback, lightning.Callback))
    assert vars(tracker_module.UpdateTracker)["on_train_end"]


def test_real_lightning_trainer(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed; `make trainers` installs it")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = TinyModel()

        def training_step(self, batch, _):
            return self.model(batch["x"])["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    class Recorder(lightning.pytorch.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, dict(metrics)))

    recorder, module = Recorder(), Module()
    masks = {f"model.{name}": mask for name, mask in hidden_masks().items()}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=recorder,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        callbacks=[UpdateTracker(masks=masks, logging_steps=3)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=4))
    with_values = {step: row for step, row in recorder.rows if "opdkernels/update_norm" in row}
    assert list(with_values) == [2, 5]  # every third step, although the loggers get others at every second one
    assert all(row.keys() >= NAMES | MASK_NAMES for row in with_values.values())
    assert 0 < with_values[2]["opdkernels/update_norm"] < with_values[5]["opdkernels/update_norm"]
    assert trainer.callback_metrics["opdkernels/update_norm"] == pytest.approx(with_values[5]["opdkernels/update_norm"])
