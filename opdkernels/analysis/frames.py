"""What the result objects share: their tables as pandas DataFrames, their path in `repr`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A table as a DataFrame. Raises ImportError that names the extra if pandas is not installed."""
    try:
        importlib.import_module("pandas")
    except ImportError:
        raise ImportError("to_pandas needs pandas; run pip install opdkernels[pandas]") from None
    return table.to_pandas()


def format_path(path: Path | None) -> str:
    """The run directory in `repr`: a quoted string, or None."""
    return "None" if path is None else repr(str(path))
