"""What training does to the weights while it does it: at marks, the tally against the start and since the last mark, the changed
set, the set of all that ever changed, and what the optimizer's moments say.

The start and the last mark are copies in mapped files beside the run, as large as the weights; what changed is a file of masks a
mark, so that `opdkernels mask` and MaskedAdamW take it. Figures are those of `opdkernels trajectory`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.bits import popcount
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.distillation.world import Ranks
from opdkernels.masks import MaskSet
from opdkernels.masks.mask import Mask
from opdkernels.metrics.coordinates import VIEWS, SparseTally, tensor_metrics
from opdkernels.ops.delta import Tally, delta
from opdkernels.optim.active import active_of
from opdkernels.optim.binding import is_dtensor, local_part
from opdkernels.optim.masked import MaskedOptimizer

ALIGNED = 64
SLICE = 1 << 18  # numbers that stay near a core while several sums are taken of them


def effective(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a model computes with, by the names of the plain model: LoRA's factors multiplied out, one at a time."""
    if not hasattr(model, "get_base_model"):
        yield from ((name, param.detach()) for name, param in model.named_parameters())
        return
    for name, param in model.get_base_model().named_parameters():
        if ".base_layer." in name:
            module = model.get_base_model().get_submodule(name.rpartition(".base_layer.")[0])
            change = module.get_delta_weight("default").detach() if name.endswith("weight") else 0
            yield name.replace(".base_layer", ""), (param.detach().float() + change).to(param.dtype)
        elif "lora_" not in name:
            yield name, param.detach()


def here(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What of `effective` weights lives on this process."""
    return ((name, local_part(weight)[0]) for name, weight in effective(model))


def whole_mask(bits: torch.Tensor, weight: torch.Tensor) -> Mask:
    """The mask of a weight from bits of what of it lives here; of a sharded one every process must call this."""
    if not is_dtensor(weight):
        return Mask.from_bitmap(bits, weight.shape)
    from torch.distributed.tensor import DTensor

    local = Mask.from_bitmap(bits, local_part(weight)[0].shape).to_bool().to(weight.device)
    spread = DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )  # type: ignore[attr-defined]
    return Mask.from_bool(spread.full_tensor())


class Copies:
    """Copies of a model's weights in one mapped file."""

    def __init__(self, path: Path, model: Any):
        """Those in the file, or, where there is none, of the weights as they are now."""
        if not path.exists():
            with writing(path) as write:
                for _, weight in here(model):
                    write(weight.cpu())
        self.path, self.held, place = path, {}, 0
        whole = np.memmap(path, np.uint8, "c")  # torch wants memory it could write to
        for name, weight in here(model):
            stop = place + weight.numel() * weight.element_size()
            self.held[name] = torch.from_numpy(whole[place:stop]).view(weight.dtype).view(weight.shape)
            place = stop + padding(stop)


def padding(size: int) -> int:
    return -size % ALIGNED


@contextmanager
def writing(path: Path) -> Iterator[Callable[[torch.Tensor], None]]:
    """Takes weights, one after another, for a file of copies, which is whole or not there. (Written: pages that are new to a mapping
    take several times as long.)"""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:

        def write(weight: torch.Tensor) -> None:
            data = weight.contiguous().view(-1).view(torch.uint8).numpy()
            file.write(data.data)
            file.write(bytes(padding(len(data))))

        yield write
    part.replace(path)


class Tracker:
    """Follows a model from its start; `mark` is a look at it."""

    def __init__(
        self, folder: Path, model: torch.nn.Module, step: int, start: Callable[[], Any], trained: int, ranks: Ranks
    ):
        """`step`: how many the model has taken; `start()`: the model that the run began with, should its copy be gone; `trained`:
        how many numbers are."""
        self.trained = trained
        self.folder, self.path, self.ranks = folder, folder / "track.jsonl", ranks
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        if ranks.first:
            (folder / "masks").mkdir(parents=True, exist_ok=True)
            write_rows(self.path, rows)
            for path in self.masks():
                if step_of_mask(path) > step:
                    path.unlink()
        ranks.wait()
        marks = [row["step"] for row in rows]
        first = self._weights("start")
        self.start = Copies(first, model if first.exists() or not step else start())
        self.last = Copies(self._weights(f"mark-{marks[-1]:06}"), model) if marks else self.start
        self.ever = self._union()
        self.resumable = self.last.path  # what the last checkpoint goes on from

    def _weights(self, name: str) -> Path:
        return self.folder / "weights" / f"{name}-{self.ranks.rank}.bin"

    def masks(self) -> list[Path]:
        """The files of what had changed at each mark, in order."""
        return sorted((self.folder / "masks").glob("step-*.safetensors"))

    def _union(self) -> dict[str, np.ndarray]:
        ever: dict[str, np.ndarray] = {}
        for path in self.masks():
            for name, mask in MaskSet.load(path).items():
                bits = mask.bitmap.numpy()
                ever[name] = ever[name] | bits if name in ever else bits.copy()
        return ever

    def mark(self, step: int, model: Any, moments: dict[str, float | None]) -> dict[str, Any]:
        """Looks at the weights after `step` steps. Returns the mark's row, which is also written."""
        since_last, modules = Tally.empty(), defaultdict[str, Tally](Tally.empty)
        masks: dict[str, Mask] = {}
        ever = total = 0
        before, path = self.last.path, self._weights(f"mark-{step:06}")
        with writing(path) as write:
            for name, weight in effective(model):
                local = local_part(weight)[0].cpu()
                bits = torch.zeros((local.numel() + 7) // 8, dtype=torch.uint8)
                delta(self.start.held[name], local, out=modules[parse_tensor_name(name).module or "other"], mask=bits)
                delta(self.last.held[name], local, out=since_last)
                write(local)
                masks[name] = whole_mask(bits, weight)
                own = masks[name].bitmap.numpy()
                self.ever[name] = self.ever[name] | own if name in self.ever else own.copy()
                total += masks[name].numel
                ever += popcount(self.ever[name])
        if self.ranks.first:
            MaskSet(masks).save(self.folder / "masks" / f"step-{step:06}.safetensors")
        merged = {name: reduce(Tally.merge, self.ranks.all(tally)) for name, tally in sorted(modules.items())}
        row = {
            "step": step,
            "views": in_views(reduce(Tally.merge, merged.values())),
            "since_last": in_views(reduce(Tally.merge, self.ranks.all(since_last))),
            "modules": {name: in_views(tally) for name, tally in merged.items()},
            "changed_any": ever / total if total else 0.0,
            "trained": self.trained / total if total else 0.0,
            **moments,
        }
        self.last = Copies(path, model)
        if before not in (self.start.path, self.resumable):
            before.unlink(missing_ok=True)
        if self.ranks.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def saved(self) -> None:
        """Called after a checkpoint: marks that no run can go on from are let go."""
        for path in (self.folder / "weights").glob(f"mark-*-{self.ranks.rank}.bin"):
            if path != self.last.path:
                path.unlink()
        self.resumable = self.last.path

    def finish(self) -> list[dict[str, Any]]:
        """The rows of all marks, with how each one's changed set covers the last one's, and is covered by it."""
        rows, files = read_rows(self.path), self.masks()
        if files:
            final = MaskSet.load(files[-1])
            for row, path in zip(rows, files, strict=True):
                mark = MaskSet.load(path)
                both = (mark & final).num_active
                row["recall_vs_final"] = both / final.num_active if final.num_active else None
                row["precision_vs_final"] = both / mark.num_active if mark.num_active else None
        self.ranks.wait()
        if self.ranks.first:
            write_rows(self.path, rows)
        for path in (self.folder / "weights").glob(f"*-{self.ranks.rank}.bin"):
            path.unlink()
        return rows


def in_views(tally: Tally) -> dict[str, Any]:
    """Every figure of a tally, as stored and as a bf16 deployment sees it."""
    sparse = SparseTally.of(tally)
    return {view: tensor_metrics(sparse, view) for view in VIEWS}


def trained_by(optimizer: MaskedOptimizer, ranks: Ranks, device: torch.device) -> int:
    """How many numbers an optimizer may move, over all processes."""
    return int(
        ranks.total({"active": sum(binding.shard(param).active for _, param, binding in optimizer._live())}, device)[
            "active"
        ]
    )


def moments_of(optimizer: MaskedOptimizer, ranks: Ranks) -> dict[str, float | None]:
    """Before a step: the coefficient of variation of sqrt(v) over the active coordinates, and the cosine of the gradient with the
    momentum; of SGD the latter alone."""
    sums = dict.fromkeys(("n", "root", "square", "dot", "momentum", "gradient"), 0.0)
    for at, param, binding in optimizer._live():
        state = optimizer.state.get(param, {})
        for squares in state.get("exp_avg_sq", torch.empty(0)).split(SLICE):
            add(
                sums,
                n=squares.numel(),
                root=squares.sqrt().sum(dtype=torch.float64),
                square=squares.sum(dtype=torch.float64),
            )
        held, grad = state.get("exp_avg", state.get("momentum_buffer")), optimizer._gradient(at, param)
        if held is not None and grad is not None:
            values = grad if at in optimizer._compact else active_of(grad, binding.shard(param))
            for momentum, gradient in zip(held.split(SLICE), values.split(SLICE), strict=True):
                a, b = momentum.double(), gradient.double()
                add(sums, dot=a @ b, momentum=a @ a, gradient=b @ b)
    found = ranks.total(sums, param.device)
    mean = found["root"] / found["n"] if found["n"] else 0
    spread = math.sqrt(max(found["square"] / found["n"] - mean**2, 0)) / mean if mean else None
    sizes = math.sqrt(found["momentum"] * found["gradient"])
    return finite({"sqrt_v_cv": spread, "gradient_momentum_cosine": found["dot"] / sizes if sizes else None})


def add(sums: dict[str, float], **more: Any) -> None:
    for name, value in more.items():
        sums[name] += float(value)


def step_of_mask(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def finite(value: Any) -> Any:
    """A row as JSON takes it: None for what is no number."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that was cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces a file of JSON lines at once."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(path)
