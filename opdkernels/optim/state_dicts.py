"""Matches a saved state to the parameters of an optimizer: by name where both have names, else by position."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdkernels.checkpoint.names import canonical_name, unwrap_name
from opdkernels.errors import InputError, printable

Groups = Sequence[Mapping[str, Any]]


@dataclass
class SavedState:
    """A saved state in the order of an optimizer's parameters.

    Attributes:
        groups: The saved options of each group.
        states: The saved state of each parameter; {} where there is none.
        others: Entries that belong to no parameter, which users and hooks add.
    """

    groups: list[dict[str, Any]]
    states: list[Mapping[str, Any]]
    others: dict[Any, Any]


def match_saved(state_dict: Any, groups: Groups, state_names: Sequence[str]) -> SavedState:
    """Match a saved state to the groups of an optimizer.

    Args:
        state_dict: What `state_dict()` of an optimizer returned, or torch.distributed.checkpoint with names as keys.
        groups: The groups of the optimizer.
        state_names: Names by which the state of a parameter is recognised.

    Raises:
        InputError: This is no state of an optimizer, or it has other parameters.
    """
    try:
        saved_groups = copy.deepcopy(list(state_dict["param_groups"]))
        states = dict(state_dict["state"])
        keys = [list(group["params"]) for group in saved_groups]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"this is no optimizer state ({printable(repr(error))}); give what state_dict() returned"
        ) from None
    order, keys_in_order = match_params(saved_groups, keys, groups)
    known = {key for group_keys in keys for key in group_keys}
    others = {key: value for key, value in states.items() if key not in known}
    for key, value in others.items():
        if isinstance(value, Mapping) and any(name in value for name in state_names):
            raise InputError(
                f"the optimizer state has an entry {printable(str(key))} of no parameter in its groups; "
                "give the state as state_dict() returned it"
            )
    entries = [states.get(key) or {} for key in keys_in_order]
    for key, entry in zip(keys_in_order, entries, strict=True):
        if not isinstance(entry, Mapping):
            raise InputError(
                f"the optimizer state of {printable(str(key))} is {type(entry).__name__}, not a dict; "
                "give what state_dict() returned"
            )
    options = [{k: v for k, v in saved_groups[index].items() if k != "params"} for index in order]
    return SavedState(options, entries, others)


def match_params(saved_groups: Groups, keys: list[list[Any]], groups: Groups) -> tuple[list[int], list[Any]]:
    """The saved group of each group, and the saved key of each parameter."""
    sizes, wanted = [len(group_keys) for group_keys in keys], [len(group["params"]) for group in groups]
    saved_names = [names_of(group, group_keys) for group, group_keys in zip(saved_groups, keys, strict=True)]
    names = [names_of(group, ()) for group in groups]
    if any(n is None for n in (*saved_names, *names)):
        if sizes != wanted:
            raise InputError(f"the optimizer state has groups of {sizes} parameters, this optimizer of {wanted}")
        return list(range(len(groups))), [key for group_keys in keys for key in group_keys]
    position = {
        name: (index, key)
        for index, (group_names, group_keys) in enumerate(zip(saved_names, keys, strict=True))
        for name, key in zip(group_names or (), group_keys, strict=True)
    }
    match = match_names([name for group_names in names for name in group_names or ()], list(position))
    order: list[int] = []
    keys_in_order: list[Any] = []
    for group_names, size in zip(names, wanted, strict=True):
        matched = [position[match[name]] for name in group_names or ()]
        indices = {index for index, _ in matched}
        if len(indices) > 1 or (matched and sizes[matched[0][0]] != size):
            raise InputError(
                f"the parameters of the group of {printable((group_names or [''])[0])} are in other groups of the "
                "optimizer state, so their options are not known; make the same groups as in the saved run"
            )
        order.append(matched[0][0] if matched else len(order))
        keys_in_order += [key for _, key in matched]
    return order, keys_in_order


def names_of(group: Mapping[str, Any], keys: Sequence[Any]) -> list[str] | None:
    """The names of a group's parameters; None where it has none. Keys that are strings are names."""
    names = group.get("param_names") or (keys if all(isinstance(key, str) for key in keys) else [])
    names = [str(name) for name in names]
    return names if len(names) == len(group["params"]) else None


def match_names(names: Sequence[str], saved_names: Sequence[str]) -> dict[str, str]:
    """The saved name of each name: equal, or equal without the prefixes of wrappers. Raises InputError if one lacks."""
    for form in (str, unwrap_name, canonical_name):
        saved = {form(name): name for name in saved_names}
        forms = [form(name) for name in names]
        if len(saved) == len(saved_names) and len(set(forms)) == len(forms) and saved.keys() == set(forms):
            return {name: saved[key] for name, key in zip(names, forms, strict=True)}
    lacking = next((name for name in names if name not in saved_names), names[0] if names else "")
    surplus = next((name for name in saved_names if name not in names), "")
    raise InputError(
        f"the optimizer state is of {len(saved_names)} parameters"
        + (f" such as {printable(surplus)}" if surplus else "")
        + f", this optimizer has {len(names)} such as {printable(lacking)}; load the state of the same parameters"
    )
