"""Upload of what this package writes to the Hugging Face Hub, with a model card."""

from opdkernels.hub.push import push_to_hub

__all__ = ["push_to_hub"]
