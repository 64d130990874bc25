"""The object in a PyTorch file: a state dict, a training checkpoint with one inside, or something that is rejected."""

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
    """Returns the named tensors of a state dict, which may be nested in the keys of `WRAPPERS`.

    Values that are not tensors (steps, versions) are left out.

    Args:
        loaded: The object that torch.load returned.
        file: Name of the file, for messages.

    Raises:
        InputError: There is no state dict or more than one, or a tensor is of a kind without plain bytes.
    """
    import torch

    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds a {_kind(loaded)}, not a state dict; save model.state_dict()")
    table = loaded
    where = ""
    for _ in range(4):  # nested wrappers: a trainer wraps what a parallel engine saved
        candidates = [key for key in WRAPPERS if isinstance(table.get(key), dict) and table[key]]
        if len(candidates) > 1:
            raise InputError(
                f"{file} holds more than one state dict ({', '.join(where + key for key in candidates)});"
                " save one of them alone"
            )
        if not candidates:
            break
        table, where = table[candidates[0]], f"{where}{candidates[0]}."
    if "param_groups" in table or (not where and _is_optimizer(table)):
        raise InputError(
            f"{file} holds an optimizer's state, not a model; give the model's file, such as model.safetensors"
        )
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
    """Whether a table without a nested state dict has a key of an optimizer's state."""
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
            f"{file}: tensor {printable(name)} is quantised or of an unsupported type ({kind}), which is not read yet;"
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
