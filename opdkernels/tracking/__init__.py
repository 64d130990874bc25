"""What changes in a model's weights, logged while another program's loop trains it."""

from opdkernels.tracking.tracker import UpdateTracker

__all__ = ["UpdateTracker"]
