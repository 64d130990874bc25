"""A sync patch: the changes of a model's tensors from one version of its weights to a later one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from opdkernels.errors import InputError, UsageError
from opdkernels.patch.manifest import digest_all
from opdkernels.sync import file
from opdkernels.sync.apply import apply_to_model
from opdkernels.sync.live import Model
from opdkernels.sync.manifest import LARGEST
from opdkernels.sync.tensor_patch import TensorPatch, merge_tensor

FlatChanges = tuple[str, tuple[int, ...], torch.dtype, torch.Tensor | None, torch.Tensor]


def model_digest(digests: Mapping[str, int]) -> str:
    """Returns the digest of a model from the additive digests of its tensors by name: 32 hexadecimal digits.

    It is blake2b-128 of the compact JSON of [name, digest as 16 hexadecimal digits], sorted by name.
    """
    return digest_all({name: f"{digest:016x}" for name, digest in digests.items()})


@dataclass(frozen=True)
class Patch:
    """The changes from one version of a model's weights to a later one. A value: nothing changes it.

    Attributes:
        tensors: The tensors that changed.
        base_digest: Digest of all the model's tensors before the changes (see `model_digest`).
        digest: The same after the changes.
        run: Identifies the sequence of versions, 32 hexadecimal digits; None until the patch is numbered.
        base_version: Version that the patch changes; None until it is numbered.
        version: Version that it makes; None until it is numbered.

    >>> from opdkernels.sync import ChangeTracker
    >>> model = torch.nn.Linear(100, 100)
    >>> replica = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    >>> tracker = ChangeTracker(model)
    >>> with torch.no_grad():
    ...     _ = model.weight[3].add_(1)
    >>> patch = tracker.take()
    >>> patch.names, patch.changed
    (['weight'], 100)
    >>> _ = patch.apply_(replica)
    >>> torch.equal(replica["weight"], model.weight)
    True
    """

    tensors: tuple[TensorPatch, ...]
    base_digest: str
    digest: str
    run: str | None = None
    base_version: int | None = None
    version: int | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tensors that changed; of a tied tensor, the first one."""
        return [tensor.name for tensor in self.tensors]

    @property
    def changed(self) -> int:
        """The number of stored coordinates; of a tensor stored whole, all of them."""
        return sum(tensor.changed for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of counts, positions and values."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def numbered(self, *, run: str, base_version: int, version: int) -> Patch:
        """Returns the same changes with a run and versions.

        Args:
            run: 32 hexadecimal digits, such as secrets.token_hex(16); patches of two runs never follow each other.
            base_version: Version that the patch changes, not negative.
            version: Version that it makes, larger than `base_version`.

        Raises:
            UsageError: An argument is not valid.
        """
        if len(run) != 32 or not set(run) <= set("0123456789abcdef"):
            raise UsageError(f"run is {run[:40]!r}; give 32 hexadecimal digits, such as secrets.token_hex(16)")
        if not 0 <= base_version < version < LARGEST:
            raise UsageError(
                f"versions are {base_version} and {version}; give a version larger than its base version, from 0"
            )
        return replace(self, run=run, base_version=base_version, version=version)

    def flat(self) -> Iterator[FlatChanges]:
        """Yields (name, shape, dtype, positions, values) of each tensor.

        Positions are flat, increasing and unique, int64 [changed] if the tensor has 2^31 coordinates or more, otherwise
        int32; None for a tensor stored whole. Values have the dtype, [changed].
        """
        for tensor in self.tensors:
            positions = tensor.positions()
            if positions is not None and tensor.numel < 1 << 31:
                positions = positions.int()
            yield tensor.name, tensor.shape, tensor.dtype, positions, tensor.changes.values.view(tensor.dtype)

    @staticmethod
    def merge(first: Patch, second: Patch) -> Patch:
        """Returns one patch with the effect of two consecutive ones. Where both change a coordinate, the later remains.

        Args:
            first: The earlier patch.
            second: The patch that follows it.

        Raises:
            InputError: `second` does not begin with the weights, run and version that `first` ends with.
        """
        if (first.run, first.version) != (second.run, second.base_version):
            raise InputError(
                f"the first patch makes version {first.version} of run {first.run}, the second changes version"
                f" {second.base_version} of run {second.run}; merge consecutive patches in their order"
            )
        if first.digest != second.base_digest:
            raise InputError(
                f"the first patch ends with weights of digest {first.digest}, the second begins with"
                f" {second.base_digest}; merge consecutive patches in their order"
            )
        later = {tensor.name: tensor for tensor in second.tensors}
        merged = [
            merge_tensor(tensor, later.pop(tensor.name)) if tensor.name in later else tensor for tensor in first.tensors
        ]
        return replace(
            second,
            tensors=(*merged, *later.values()),
            base_digest=first.base_digest,
            base_version=first.base_version,
        )

    def apply_(self, model: Model, digests: Mapping[str, int] | None = None) -> dict[str, int]:
        """Changes live tensors in place: verified before the first byte is written, all of them or none.

        Tensors may be on any device, with any strides. Tensors that are tied in the patch's model and not here are all
        changed. A patch that was applied already changes nothing.

        Args:
            model: A module or its state dict; tensors that the patch does not change are not read.
            digests: Additive digests of all the model's tensors, as `ChangeTracker.digests` or an earlier call
                returned them. The work is then O(changed), and the whole model is compared with the patch's base.
                Default: computed from the tensors that the patch changes, and only those are compared.

        Returns:
            `digests`, or those of the changed tensors, as they are after the changes.

        Raises:
            InputError: A tensor is missing, of another dtype or shape, or not the one that the patch changes.
            UsageError: `model` is neither a module nor a mapping.
        """
        after = {tensor.name: tensor.digest for tensor in self.tensors}
        if digests is not None:
            if (held := model_digest(digests)) == self.digest:
                return dict(digests)
            if held != self.base_digest or model_digest({**digests, **after}) != self.digest:
                raise InputError(
                    f"the model has digest {held}, the patch changes {self.base_digest} to {self.digest}: the model"
                    " holds other weights; apply the patches in between, or load the full weights"
                )
        apply_to_model(model, self.tensors, digests)
        return {**(digests or {}), **after}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the patch to a file, atomically, in the format `opds` 1.

        Args:
            path: File to write.
            overwrite: Replaces an existing sync patch.

        Raises:
            InputError: The file exists, or may not be written.
            UsageError: The patch has no run and versions.
            OSError: The file cannot be written; nothing is left of it.
        """
        if self.run is None or self.base_version is None or self.version is None:
            raise UsageError("the patch has no run and versions, which a file needs; save patch.numbered(...)")
        file.write(
            path,
            self.tensors,
            run=self.run,
            base_version=self.base_version,
            version=self.version,
            base_digest=self.base_digest,
            digest=self.digest,
            overwrite=overwrite,
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Patch:
        """Reads a patch into memory and validates all of it.

        Raises:
            InputError: The file is missing, damaged, not a sync patch, or of another version of the format.
        """
        manifest, tensors = file.read(path)
        return cls(
            tuple(tensors),
            manifest.base_digest,
            manifest.digest,
            manifest.run,
            manifest.base_version,
            manifest.version,
        )
