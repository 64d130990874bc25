"""The object in a PyTorch file: a state dict, a training checkpoint with one inside, or something that is rejected."""

from __future__ import annotations

from typing import Any

from opdkernels.checkpoint.pickle_data import Opaque, PickledTensor, type_name
from opdkernels.errors import InputError, printable

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
OPTIMIZER_KEYS = frozenset(
    {"optimizer", "optimizer_state", "optimizer_state_dict", "optimizer_states", "optim", "optim_state"}
    | {"param_groups", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    | {"fp32_flat_groups", "single_partition_of_fp32_groups"}
)


def find_state_dict(loaded: Any, file: str) -> dict[str, PickledTensor]:
    """Returns the named tensors of a state dict, which may be nested in the keys of `WRAPPERS`.

    Values that are not tensors (steps, versions) are left out.

    Args:
        loaded: The value of the file's pickle, from `read_pickle`.
        file: Name of the file, for messages.

    Raises:
        InputError: There is no state dict or more than one, or a tensor is of a kind without plain bytes.
    """
    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds a {printable(type_name(loaded))}, not a state dict; save model.state_dict()")
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
        if isinstance(value, PickledTensor):
            if not isinstance(name, str):
                raise InputError(f"{file}: a tensor is called {printable(name.kind)}; names must be strings")
            validate_tensor(value, name, file)
            tensors[name] = value
        elif isinstance(value, Opaque) and value.kind == "numpy.ndarray":
            raise InputError(f"{file}: {_shown(name)} is a NumPy array; save it as a tensor, with torch.from_numpy()")
    if not tensors:
        raise InputError(f"{file} holds no tensors ({_contents(table)}); save model.state_dict()")
    return tensors


def _is_optimizer(table: dict[Any, Any]) -> bool:
    """Whether a table without a nested state dict has a key of an optimizer's state."""
    return any(isinstance(key, str) and key in OPTIMIZER_KEYS for key in table)


def validate_tensor(tensor: PickledTensor, name: str, file: str) -> None:
    """Raises InputError unless a tensor consists of plain bytes and has a name of Unicode text."""
    kind, shown = tensor.kind, f"{file}: tensor {printable(name)}"
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise InputError(f"{shown} has a name with an unpaired surrogate, which is not Unicode text; rename it")
    if kind in ("DTensor", "ShardedTensor"):
        raise InputError(
            f"{shown} is a {kind}: FSDP shards are not read yet; merge them into safetensors,"
            " for verl with `python -m verl.model_merger merge`"
        )
    if kind == "meta":
        raise InputError(f"{shown} is on the meta device and has no values; load the weights before you save them")
    if kind == "sparse":
        raise InputError(f"{shown} is sparse; save it after .to_dense()")
    if kind == "lazy":
        raise InputError(f"{shown} is a lazy conjugate or negative; save it after .clone()")
    if kind != "Tensor" or tensor.dtype.startswith(("qint", "quint")):
        raise InputError(
            f"{shown} is quantised or of an unsupported type ({printable(kind)}), which is not read yet;"
            " dequantise the model to bf16 and save it as safetensors"
        )


def _contents(table: dict[Any, Any]) -> str:
    if not table:
        return "it is empty"
    keys = ", ".join(_shown(key) for key in list(table)[:4])
    return f"its keys are {keys}" + (", ..." if len(table) > 4 else "")


def _shown(key: Any) -> str:
    return printable(key if isinstance(key, str) else type_name(key))
