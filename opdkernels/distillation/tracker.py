"""Snapshots of what training changes in the weights: metrics against the start and since the last snapshot, the changed
set, the set of all coordinates that ever changed, and statistics of the optimizer's moments.

The start and the last snapshot are copies in memory-mapped files in the run's folder, as large as the weights. The
changed set of each snapshot is a file of masks, as `opdkernels mask` and MaskedAdamW take it. The metrics are those of
`opdkernels trajectory`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.bits import popcount
from opdkernels.checkpoint.io import guard_array
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.distillation.jsonl import append_row, finite, read_rows, write_rows
from opdkernels.distillation.world import World
from opdkernels.errors import InputError, printable
from opdkernels.files import atomic_file
from opdkernels.masks import MaskSet
from opdkernels.masks.mask import Mask
from opdkernels.metrics.coordinates import compute_metrics, none_for_nan
from opdkernels.metrics.registry import VIEWS
from opdkernels.ops.delta import Tally, delta
from opdkernels.ops.delta.many import SparseTally
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.binding import is_dtensor, local_part

SNAPSHOTS_FILE = "snapshots.jsonl"
ALIGNMENT = 64  # bytes
SLICE = 1 << 18  # values that stay in cache while several sums are taken of them


def effective_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a model computes with, by the names of the model without LoRA; factors are multiplied out one
    weight at a time."""
    if not hasattr(model, "get_base_model"):
        yield from ((name, param.detach()) for name, param in model.named_parameters())
        return
    for name, param in model.get_base_model().named_parameters():
        if ".base_layer." in name:
            module = model.get_base_model().get_submodule(name.rpartition(".base_layer.")[0])
            update = module.get_delta_weight("default").detach() if name.endswith("weight") else 0
            yield name.replace(".base_layer", ""), (param.detach().float() + update).to(param.dtype)
        elif "lora_" not in name:
            yield name, param.detach()


def local_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This process's part of the effective weights."""
    return ((name, local_part(weight)[0]) for name, weight in effective_weights(model))


def gather_mask(local_bits: torch.Tensor, weight: torch.Tensor) -> Mask:
    """The mask of a weight from the bits of its local part; every process must call this for a sharded weight."""
    if not is_dtensor(weight):
        return Mask.from_bitmap(local_bits, weight.shape)
    from torch.distributed.tensor import DTensor

    local = Mask.from_bitmap(local_bits, local_part(weight)[0].shape).to_bool().to(weight.device)
    sharded = DTensor.from_local(
        local,
        weight.device_mesh,  # type: ignore[attr-defined]
        weight.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return Mask.from_bool(sharded.full_tensor())


class WeightCopy:
    """A copy of a model's local weights in one file: mapped, or read where a mapping cannot be guarded."""

    def __init__(self, path: Path, model: Any):
        """Opens the file, or creates it from the model's current weights."""
        if not path.exists():
            with write_weights(path) as write:
                for _, weight in local_weights(model):
                    write(weight.cpu())
        self.path, self.tensors, start = path, {}, 0
        expected = 0
        for _, weight in local_weights(model):
            expected += weight.numel() * weight.element_size()
            expected += padding(expected)
        size = path.stat().st_size
        if size != expected or not path.is_file():
            raise InputError(
                f"{printable(str(path))} has {size} bytes, and the model's weights {expected}; restore it from a copy,"
                " or start again with --overwrite"
            )
        # torch wants writable memory
        data: np.ndarray = np.memmap(path, np.uint8, "c") if expected else np.empty(0, np.uint8)
        self._num_faults = guard_array(data)
        if self._num_faults is None:
            data = np.fromfile(path, np.uint8, expected)
        for name, weight in local_weights(model):
            stop = start + weight.numel() * weight.element_size()
            self.tensors[name] = torch.from_numpy(data[start:stop]).view(weight.dtype).view(weight.shape)
            start = stop + padding(stop)

    def check(self) -> None:
        """Raises InputError if the file was truncated while it was mapped."""
        if self._num_faults is not None and self._num_faults():
            raise InputError(
                f"{printable(str(self.path))} was truncated while it was open; restore it from a copy, or start again"
                " with --overwrite"
            )


def padding(size: int) -> int:
    """Bytes from the end of a tensor to the next aligned offset."""
    return -size % ALIGNMENT


@contextmanager
def write_weights(path: Path) -> Iterator[Callable[[torch.Tensor], None]]:
    """A function that appends a weight to a new file; the file appears when all are written.

    It is written, not mapped: page faults of a new mapping take several times as long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:

        def write(weight: torch.Tensor) -> None:
            data = weight.contiguous().view(-1).view(torch.uint8).numpy()
            file.write(data.data)
            file.write(bytes(padding(len(data))))

        yield write


class Tracker:
    """Takes snapshots of a model from the start of its run."""

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        *,
        step: int,
        load_start: Callable[[], Any],
        num_trainable: int,
        world: World,
    ):
        """Opens the snapshots of a run, without those after `step`.

        Args:
            folder: The run's folder.
            model: The trained model after `step` steps.
            step: Steps that the model has taken.
            load_start: Loads the model at the start of the run, if its copy is missing.
            num_trainable: Number of trainable values.
            world: Processes of the run.
        """
        self.folder, self.path, self.world = folder, folder / SNAPSHOTS_FILE, world
        self.num_trainable = num_trainable
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        if world.is_main:
            (folder / "masks").mkdir(parents=True, exist_ok=True)
            write_rows(self.path, rows)
            for path in self.mask_files():
                if step_of_mask(path) > step:
                    path.unlink()
        world.barrier()
        start_path = self._weights_path("start")
        self.start = WeightCopy(start_path, model if start_path.exists() or not step else load_start())
        self.last = WeightCopy(self._snapshot_path(rows[-1]["step"]), model) if rows else self.start
        self.changed_any = self._load_changed_any()
        self.resume_path = self.last.path  # the copy that a run resumed from the last checkpoint needs

    def _weights_path(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}-{self.world.rank}.bin"

    def _snapshot_path(self, step: int) -> Path:
        return self._weights_path(f"snapshot-{step:06}")

    def mask_files(self) -> list[Path]:
        """The changed set of each snapshot, in order."""
        return sorted((self.folder / "masks").glob("step-*.safetensors"))

    def _load_changed_any(self) -> dict[str, np.ndarray]:
        """Bits of all coordinates that had changed at any snapshot, by weight."""
        changed_any: dict[str, np.ndarray] = {}
        for path in self.mask_files():
            for name, mask in MaskSet.load(path).items():
                bits = mask.bitmap.numpy()
                changed_any[name] = changed_any[name] | bits if name in changed_any else bits.copy()
        return changed_any

    def snapshot(self, step: int, model: Any, optimizer_metrics: dict[str, float | None]) -> dict[str, Any]:
        """Compares the weights after `step` steps with the start and the last snapshot. Returns the row it writes."""
        since_last, modules = Tally.empty(), defaultdict[str, Tally](Tally.empty)
        masks: dict[str, Mask] = {}
        num_changed_any = numel = 0
        previous_path, path = self.last.path, self._snapshot_path(step)
        with write_weights(path) as write:
            for name, weight in effective_weights(model):
                local = local_part(weight)[0].cpu()
                local_bits = torch.zeros((local.numel() + 7) // 8, dtype=torch.uint8)
                module = parse_tensor_name(name).module or "other"
                delta(self.start.tensors[name], local, out=modules[module], mask=local_bits)
                delta(self.last.tensors[name], local, out=since_last)
                write(local)
                masks[name] = gather_mask(local_bits, weight)
                bits = masks[name].bitmap.numpy()
                self.changed_any[name] = self.changed_any[name] | bits if name in self.changed_any else bits.copy()
                numel += masks[name].numel
                num_changed_any += popcount(self.changed_any[name])
        self.start.check()
        self.last.check()
        if self.world.is_main:
            MaskSet(masks).save(self.folder / "masks" / f"step-{step:06}.safetensors", overwrite=True)
        merged = {name: self._merge(tally) for name, tally in sorted(modules.items())}
        views, views_since_last, *module_views = metrics_by_view(
            [reduce(Tally.merge, merged.values()), self._merge(since_last), *merged.values()]
        )
        row = {
            "step": step,
            "views": views,
            "since_last": views_since_last,
            "modules": dict(zip(merged, module_views, strict=True)),
            "changed_any": num_changed_any / numel if numel else 0.0,
            "trained": self.num_trainable / numel if numel else 0.0,
            **optimizer_metrics,
        }
        self.last = WeightCopy(path, model)
        if previous_path not in (self.start.path, self.resume_path):
            previous_path.unlink(missing_ok=True)
        if self.world.is_main:
            append_row(self.path, row)
        return row

    def _merge(self, tally: Tally) -> Tally:
        """The tally of all processes."""
        return reduce(Tally.merge, self.world.all_gather(tally))

    def on_save(self) -> None:
        """Deletes copies that no run can resume from; called after a checkpoint."""
        for path in (self.folder / "weights").glob(f"snapshot-*-{self.world.rank}.bin"):
            if path != self.last.path:
                path.unlink()
        self.resume_path = self.last.path

    def finish(self) -> list[dict[str, Any]]:
        """Adds recall and precision against the final changed set to every row, and deletes the copies. Returns the
        rows."""
        rows, files = read_rows(self.path), self.mask_files()
        if files:
            final = MaskSet.load(files[-1])
            paths = {step_of_mask(path): path for path in files}
            for row in rows:
                if row["step"] not in paths:  # it was deleted by hand
                    row["recall_vs_final"] = row["precision_vs_final"] = None
                    continue
                changed = MaskSet.load(paths[row["step"]])
                in_both = (changed & final).num_active
                row["recall_vs_final"] = in_both / final.num_active if final.num_active else None
                row["precision_vs_final"] = in_both / changed.num_active if changed.num_active else None
        self.world.barrier()
        if self.world.is_main:
            write_rows(self.path, rows)
        for path in (self.folder / "weights").glob(f"*-{self.world.rank}.bin"):
            path.unlink()
        return rows


def metrics_by_view(tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """All metrics of each tally, as stored and as visible to a bf16 deployment."""
    sparse = [SparseTally.of(tally) for tally in tallies]
    columns = {view: compute_metrics(sparse, view) for view in VIEWS}
    return [
        {view: {name: none_for_nan(values[i]) for name, values in columns[view].items()} for view in VIEWS}
        for i in range(len(tallies))
    ]


def count_trainable(optimizer: MaskedOptimizer, world: World, device: torch.device) -> int:
    """Number of values that an optimizer may change, over all processes."""
    num_active = sum(binding.local_mask(param).num_active for _, param, binding in optimizer._bindings())
    return int(world.all_reduce({"active": num_active}, device)["active"])


def optimizer_stats(optimizer: MaskedOptimizer, world: World) -> dict[str, float | None]:
    """Statistics of the moments before a step, over the active coordinates of all processes.

    Returns:
        sqrt_v_cv: coefficient of variation of sqrt(exp_avg_sq); None for SGD.
        gradient_momentum_cosine: cosine of the gradient with the momentum; None if there is none yet.
    """
    sums = dict.fromkeys(("n", "root", "square", "dot", "momentum", "gradient"), 0.0)
    for index, param, binding in optimizer._bindings():
        state = optimizer.state.get(param, {})
        for exp_avg_sq in state.get("exp_avg_sq", torch.empty(0)).split(SLICE):
            sums["n"] += exp_avg_sq.numel()
            sums["root"] += float(exp_avg_sq.sqrt().sum(dtype=torch.float64))
            sums["square"] += float(exp_avg_sq.sum(dtype=torch.float64))
        momentum = state.get("exp_avg", state.get("momentum_buffer"))
        grad = optimizer._active_gradient(index, param, binding)
        if momentum is not None and grad is not None:
            for momentum_slice, grad_slice in zip(momentum.split(SLICE), grad.split(SLICE), strict=True):
                m, g = momentum_slice.double(), grad_slice.double()
                sums["dot"] += float(m @ g)
                sums["momentum"] += float(m @ m)
                sums["gradient"] += float(g @ g)
    totals = world.all_reduce(sums, param.device)
    mean = totals["root"] / totals["n"] if totals["n"] else 0
    cv = math.sqrt(max(totals["square"] / totals["n"] - mean**2, 0)) / mean if mean else None
    norms = math.sqrt(totals["momentum"] * totals["gradient"])
    return finite({"sqrt_v_cv": cv, "gradient_momentum_cosine": totals["dot"] / norms if norms else None})


def step_of_mask(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
