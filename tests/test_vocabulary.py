"""The tree uses standard terms: each pattern is a term that was replaced, with what replaces it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".md", ".cu", ".cpp", ".h", ".inl", ".html", ".js", ".toml")

PHRASES = {  # in prose: comments, docstrings, messages, pages
    r"\bgo(es)? on after\b|\bafter a kill\b|\bgoes on from\b": "resumes",
    r"\blets? go\b": "releases",
    r"\b(is|are|was|were) told\b|\btold apart\b": "reported, distinguishable",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bat hand\b": "current, available",
    r"\bbeside\b": "next to, and",
    r"\blies\b": "is",
    r"\bhalf-way\b": "interrupted",
    r"\bone (row|file|line|word|launch|seed) an? \w+": "one per ...",
    r"\ba (second|step|token|coordinate|tensor|parameter) a (second|step|token|coordinate|tensor|parameter)\b": "per",
    r"\bbytes? a (coordinate|parameter|token|tensor)\b|\ba bit a coordinate\b": "per coordinate",
    r"\bshares? of the (coordinates|weights|gain|steps|change|model|energy|norm)\b": "fraction of",
    r"\brounding alone would show\b": "expected from bf16 rounding alone",
    r"\bchance within \|W\|": "magnitude-conditioned chance level",
    r"\blikeliest\b": "most likely",
    r"\bthe house\b|\bfloors\b": "layers, package layout",
}
AUTHORS = r"\bintervene\b|\bTrend\b|\brun_trend\b|\bauthors\b"
IDENTIFIERS = {  # names in code, options, columns
    r"\bTUNED\b|\btuned\b": "trained",
    r"--share\b|--per\b|--held-out\b|--authors-csv\b|--revert\b|--micro-batch\b(?!-)|--max-prompt\b(?!-)": "see --help",
    r"\bmost[-_]changed\b|\brandom[-_]like\b": "top-changed, magnitude-matched",
    AUTHORS: "graft, Trajectory, the paper",
    r"\bFIGURES\b|\bfigures\(": "METRICS, compute_metrics",
    r"\bplaces_of\b|\bheld_as\b|\bmasked_take_?\b|\bmasked_put_?\b": "active_indices, layout, masked_gather_",
    r"\brefuse_\w+|\bdef refuse\b": "validate_...",
    r"\b(widened|narrowed|wide_of)\(": "to_fp32, round_to_storage, compute_dtype",
    r"\bopen_source\b|\bFileSource\b|\bFileFact\b|\btwins\b|\bplain_name\b": "open_checkpoint, match_names, ...",
    r"\bcompact_gradients\b|\bmask_gradients\b|\bMaskedParameters\.(follow|read|write)\b": "gather_active_grads, ...",
    r"\btoward_init\b|precision=\"exact\"|unmasked=\"refuse\"": 'weight_decay_target="init", "split_master", "error"',
    r"\bin_found\b|\bof_change\b|\bgain_kept\b|\bchanged_ever\b|\bstays_changed\b": "mask_recall, ...",
    r"\bDEFAULT_CUTS\b|\bcuts=|\bn_cuts\b": "thresholds",
    r"\bnear_by\b|\bnear_rows\b|\bOPD_SMALL_BYTES\b": "smem_tables, smem_rows",
    r"\bunchanged_eta\b|\bETA\b": "unchanged_rtol_1e-3",
    r"\btaught\b|\bplain_cache\b|\btake_steps\b": "loss_at_ids, teacher_out, ...",
    r"\bcontender\b|\bUnproved\b|\bstart_again\b": "implementation, Inconclusive, reset",
    r"^\s+(found|one|own|whole|given|told|taught) = ": "a name for what the variable holds",
}
EXCEPTIONS = {(AUTHORS, "CITATION.cff"): "the key of the standard"}  # (pattern, file): reason


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if name.endswith(SUFFIXES) and name != "tests/test_vocabulary.py"]


@pytest.mark.parametrize(("pattern", "standard"), [*PHRASES.items(), *IDENTIFIERS.items()])
def test_replaced_terms_are_not_used(pattern, standard):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    term = re.compile(pattern)
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in tracked_files()
        if (pattern, str(path.relative_to(ROOT))) not in EXCEPTIONS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if term.search(line)
    ]
    assert hits == [], f"use: {standard}"
