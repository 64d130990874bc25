"""Sparse, lossless weight synchronisation: which coordinates of a model changed, as a patch that a replica applies.

A `ChangeTracker` on the trainer's model gives a `Patch`; `Patch.apply_` changes a replica of the model to the same
bits, all tensors or none, after it has verified that the result will have the trainer's digests.

>>> import tempfile, torch
>>> model = torch.nn.Linear(100, 100).bfloat16()
>>> replica = {name: tensor.clone() for name, tensor in model.state_dict().items()}
>>> tracker = ChangeTracker(model)
>>> with torch.no_grad():
...     _ = model.weight[:, 7].mul_(1.5)
>>> path = f"{tempfile.mkdtemp()}/patch"
>>> tracker.take().numbered(run="0" * 32, base_version=0, version=1).save(path)
>>> digests = Patch.open(path).apply_(replica)
>>> digests["weight"] == additive_digest(model.weight), torch.equal(replica["weight"], model.weight)
(True, True)
>>> tracker.take().names
[]
"""

from opdkernels.sync.digest import additive_digest, digest_at, update_digest
from opdkernels.sync.patch import Patch, model_digest
from opdkernels.sync.tracker import ChangeTracker

__all__ = ["ChangeTracker", "Patch", "additive_digest", "digest_at", "model_digest", "update_digest"]
