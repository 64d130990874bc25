"""What a PyTorch file's object is: a state dict, one inside a training checkpoint, or something that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
OPTIMIZER_KEYS = frozenset(
    {"optimizer", "optimizer_state", "optimizer_state_dict", "optimizer_states", "optim", "optim_state"}
    | {"param_groups", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    | {"fp32_flat_groups", "single_partition_of_fp32_groups"}
)


def find_state_dict(loaded: Any, file: str) -> dict[str, torch.Tensor]:
    """The named tensors of a state dict, at the top or under `state_dict`, `model_state_dict`, `model` or `module`.

    Values that are no tensors (steps, versions) are left out. Raises InputError where there is no state dict, where
    two candidates are found, or where a tensor is of a kind that has no plain bytes.
    """
    import torch

    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds a {_kind(loaded)}, not a state dict; save model.state_dict()")
    table = loaded
    where = ""
    for _ in range(4):  # wrappers in wrappers, as when a trainer wraps what a parallel engine saved
        found = [key for key in WRAPPERS if isinstance(table.get(key), dict) and table[key]]
        if len(found) > 1:
            raise InputError(
                f"{file} holds more than one state dict ({', '.join(where + key for key in found)});"
                " save the one that is meant alone"
            )
        if not found:
            break
        table, where = table[found[0]], f"{where}{found[0]}."
    if "param_groups" in table or (not where and _is_optimizer(table)):
        raise InputError(f"{file} holds an optimizer's state, not a model; give the model's file, as model.safetensors")
    tensors = {}
    for name, value in table.items():
        if isinstance(value, torch.Tensor):
            if not isinstance(name, str):
                raise InputError(f"{file}: a tensor is called {printable(repr(name))}; names must be strings")
            tensors[name] = _plain(value, name, file)
    if not tensors:
        raise InputError(f"{file} holds no tensors ({_contents(table)}); save model.state_dict()")
    return tensors


def _is_optimizer(table: dict[Any, Any]) -> bool:
    """Whether a table that is no wrapper speaks of an optimizer: one of its keys, or all entries of `state`."""
    return any(isinstance(key, str) and key in OPTIMIZER_KEYS for key in table)


def _plain(tensor: torch.Tensor, name: str, file: str) -> torch.Tensor:
    import torch

    kind = type(tensor).__name__
    if kind == "DTensor" or kind == "ShardedTensor":
        raise InputError(
            f"{file}: tensor {printable(name)} is a {kind}: FSDP shards are not read yet; merge them into safetensors,"
            " for verl with `python -m verl.model_merger merge`"
        )
    if tensor.is_quantized or kind not in ("Tensor", "Parameter", "Buffer"):
        raise InputError(
            f"{file}: tensor {printable(name)} is quantised or of a special kind ({kind}), which is not read yet;"
            " dequantise the model to bf16 and save it as safetensors"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"{file}: tensor {printable(name)} is sparse; save it after .to_dense()")
    if tensor.is_conj() or tensor.is_neg():
        raise InputError(f"{file}: tensor {printable(name)} is a lazy conjugate or negative; save it after .clone()")
    return tensor


def _kind(value: Any) -> str:
    return printable(type(value).__name__)


def _contents(table: dict[Any, Any]) -> str:
    if not table:
        return "it is empty"
    keys = ", ".join(printable(str(key)) for key in list(table)[:4])
    return f"its keys are {keys}" + (", ..." if len(table) > 4 else "")
