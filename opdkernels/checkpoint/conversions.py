"""Renamings of transformers' conversion registry: what a file calls its tensors and what the model calls them.

Optional: without transformers 5 nothing is renamed. Only the names are used; no model is built.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from opdkernels.checkpoint import fused
from opdkernels.checkpoint.names import canonical_name, unwrap_name

Renamer = Callable[[str], str]
HEAD = re.compile(r"(For[A-Z]\w*|LMHeadModel)$")
MAX_MODEL_TYPES = 16  # of one config, with those of its parts

log = logging.getLogger(__name__)


def model_types_of(*configs: Mapping[str, Any]) -> list[str]:
    """Returns the architectures and model types that config.json files and their parts state, without duplicates.

    After an architecture with a head comes that of its body, under which transformers registers most renamings.

    >>> model_types_of({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, {})
    ['ViTForImageClassification', 'ViTModel', 'vit']
    >>> model_types_of({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}})
    ['qwen2_vl', 'qwen2_vl_text']
    """
    names: list[Any] = []
    for config in configs:
        parts = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
        for table in [config, *parts][:MAX_MODEL_TYPES]:
            architectures = table.get("architectures")
            for architecture in architectures[:1] if isinstance(architectures, list) else ():
                names += [architecture, HEAD.sub("Model", architecture) if isinstance(architecture, str) else None]
            names.append(table.get("model_type"))
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def renamer(model_types: Iterable[str]) -> Renamer:
    """Returns a function from a tensor's name to the canonical name after the renamings of these models.

    The name is canonical but not renamed if transformers is not installed, is older than version 5, or knows none of
    the models.
    """
    # Converters compute new tensors; the fused ones among them are recognised by `fused.split`.
    renamings = [_rename_by(t) for name in model_types for t in _transforms(name) if not hasattr(t, "operations")]

    def rename(name: str) -> str:
        name = unwrap_name(name)
        for renaming in renamings:
            name = renaming(name)
        return canonical_name(name)

    return rename


def expert_layout(model_types: Iterable[str]) -> str:
    """Returns how models of these types store fused experts, see `fused.EXPERT_LAYOUTS`; "" if unknown or ambiguous.

    What this package knows comes first, then what transformers registered for loading split experts.
    """
    model_types = list(model_types)
    known = {fused.EXPERT_LAYOUTS[name] for name in model_types if name in fused.EXPERT_LAYOUTS}
    layouts = known or {layout for name in model_types if (layout := _registered_layout(name))}
    return layouts.pop() if len(layouts) == 1 else ""


def _registered_layout(model_type: str) -> str:
    operations = {
        type(operation).__name__
        for transform in _transforms(model_type)
        if any("experts" in pattern for pattern in transform.target_patterns)
        for operation in getattr(transform, "operations", ())
    }
    if "Interleave" in operations:
        return "interleaved"
    return "transposed" if "Transpose" in operations else "rows" if "MergeModulelist" in operations else ""


@lru_cache(maxsize=64)
def _transforms(model_type: str) -> tuple[Any, ...]:
    """What transformers registered for a model type or an architecture; nothing without transformers."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        return tuple(get_checkpoint_conversion_mapping(model_type) or ())
    except Exception as error:  # an optional library that is absent, older or broken only costs its renamings
        log.debug("no conversions of %s from transformers: %s", model_type, error)
        return ()


def _rename_by(transform: Any) -> Renamer:
    def rename(name: str) -> str:
        try:
            renamed = transform.rename_source_key(name)[0]
        except Exception as error:  # see above
            log.debug("transformers cannot rename %r: %s", name, error)
            return name
        return renamed if isinstance(renamed, str) and renamed else name

    return rename
