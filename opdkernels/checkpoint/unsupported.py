"""Formats that are recognised but not read: each is rejected by name, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

from opdkernels.checkpoint.base import DTYPES, TensorInfo
from opdkernels.checkpoint.buffers import is_buffer, is_packed
from opdkernels.errors import InputError, printable

FSDP_SHARD = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")
# Files that trainers save next to the model and that are not models.
TRAINER_FILES = re.compile(
    r"(training_args|optimizer|optim|scheduler|scaler|rng_state|random_states|extra_state|trainer_state|dataloader)"
    r"([._-].*)?\.(bin|pt|pth)"
)
# The prefixes of PEFT's methods, as its tuners declare them; those that other models use as words are left out.
ADAPTER = re.compile(
    r"(lora|ia3|hada|lokr|oft|boft|hra|vera_lambda|pvera_lambda|fourierft|vblora|randlora|gralora|tinylora|delora|shira"
    r"|c3a|waveft|psoft|ln_tuning|trainable_tokens|adaption)_.+"
)
OPTIMIZER_TOKENS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
QUANTISED_TOKENS = frozenset(
    {"weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "qweight", "qzeros", "g_idx"}
    | {"scb", "absmax", "quant_map", "nested_absmax", "weight_zero_point", "weight_global_scale", "weight_scale_2"}
    | {"weight_scales", "w_q", "q_weight", "q_scale", "codebooks", "trellis", "qidxs"}
)
INTEGERS = frozenset({"i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "bool"})
MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUM": "a NumPy file",
}


def validate_folder(folder: str, names: Iterable[str], model: str | None) -> None:
    """Raises InputError if the file names in a folder belong to a format that is not read yet.

    `model` is the file that would be read otherwise: where a folder holds both, the user must name the file.
    """
    names = set(names)
    shown = printable(folder)
    shards = sorted(filter(None, map(FSDP_SHARD.fullmatch, names)), key=lambda shard: shard.string)
    model_shards = [shard for shard in shards if shard[1] == "model"]
    if "adapter_config.json" in names or (model is None and any(n.startswith("adapter_model.") for n in names)):
        kind, remedy = (
            "a LoRA adapter (adapter_config.json or adapter_model.*)",
            "merge it with peft's merge_and_unload() and save that",
        )
    elif model_shards:
        sizes = sorted({int(shard[2]) for shard in model_shards})
        kind = f"FSDP shards (world size {', '.join(map(str, sizes))})"
        remedy = "merge them into safetensors, for verl with `python -m verl.model_merger merge`"
    elif shards and model is None:
        raise InputError(
            f"{shown} holds an optimizer's state ({shards[0].string}), not a model; give the model's folder"
        )
    elif ".metadata" in names:
        kind = "a torch.distributed.checkpoint (.metadata)"
        remedy = "convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
    else:
        return
    if model is not None:
        raise InputError(
            f"{shown} holds {kind} and a model ({printable(model)}); "
            f"give the path of {printable(model)} to read the model"
        )
    raise InputError(f"{shown} holds {kind}, which is not read yet; {remedy}")


def validate_file(path: str, name: str) -> None:
    """Raises InputError if a file's name alone shows that it is part of something that is not read."""
    shard = FSDP_SHARD.fullmatch(name)
    if shard and shard[1] == "model":
        raise InputError(
            f"{printable(path)} is one of {int(shard[2])} FSDP shards, which are not read yet; merge them into"
            " safetensors, for verl with `python -m verl.model_merger merge`"
        )
    if name.endswith(".distcp") or name == ".metadata":
        raise InputError(
            f"{printable(path)} is part of a torch.distributed.checkpoint, which is not read yet; convert it with"
            " `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
        )
    if TRAINER_FILES.fullmatch(name):
        raise InputError(
            f"{printable(path)} is the state of a trainer or an optimizer according to its name, not a model;"
            " give the model's file"
        )


def adapter_of(tokens: Iterable[str]) -> str:
    """The kind of adapter to which the parts of a tensor's name belong, "LoRA" or "PEFT"; "" if it is none."""
    method = next((match[1] for token in tokens if (match := ADAPTER.fullmatch(token))), "")
    return "LoRA" if method == "lora" else "PEFT" if method else ""


def validate_no_adapter(tensors: Iterable[str], path: str) -> None:
    """Raises InputError if one of the names of a checkpoint's tensors is that of an adapter, which changes weights that
    are stored elsewhere."""
    for name in tensors:
        if kind := adapter_of(name.lower().split(".")):
            raise InputError(
                f"{printable(path)}: tensor {printable(name)} belongs to a {kind} adapter, which changes other tensors;"
                " merge it with peft's merge_and_unload() and save that"
            )


def validate_tensors(tensors: dict[str, TensorInfo], path: str) -> None:
    """Raises InputError that names the first tensor of an adapter, of an optimizer, or of a quantised model, or the
    first one without its values."""
    mxfp4 = {name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")}
    for name, info in tensors.items():
        # An adapter's token may be inside the name, as in lora_A.default.weight; a scale's is always the last.
        tokens = name.lower().split(".")
        if kind := adapter_of(tokens):
            what = (
                f"belongs to a {kind} adapter, which is not read yet;"
                " merge it with peft's merge_and_unload() and save that"
            )
        elif OPTIMIZER_TOKENS.intersection(tokens):
            what = "belongs to an optimizer's state, not a model; give the model's file"
        elif info.shape == (0,) and info.dtype in DTYPES and not is_buffer(name, info.shape):
            what = (
                "is an empty placeholder of DeepSpeed ZeRO-3, which keeps the values in other files; run"
                " zero_to_fp32.py in the checkpoint's folder, or train with stage3_gather_16bit_weights_on_model_save"
            )
        elif (
            tokens[-1] in QUANTISED_TOKENS
            or "quant_state" in tokens  # of bitsandbytes
            or is_packed(name, info.shape, info.dtype)
            or (tokens[-1] == "weight" and info.dtype in INTEGERS and len(info.shape) > 1)
            or info.dtype.startswith(("f8_", "f6_", "f4"))
            or (name.endswith("_scales") and name.removesuffix("_scales") in mxfp4)
        ):
            what = (
                f"({printable(info.dtype)}) belongs to an fp8 or quantised model, which is not read yet;"
                " dequantise it to bf16 first: its codes mean nothing without their scales"
            )
        else:
            continue
        raise InputError(f"{printable(path)}: tensor {printable(name)} in {printable(info.file)} {what}")
