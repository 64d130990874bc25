"""`--paper-csv` writes the metrics as documented, computed here from the coordinates with torch."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import pytest
import torch

from opdkernels import analyze
from opdkernels.checkpoint.match import open_pair
from opdkernels.compat import paper_csv
from opdkernels.outputs import PAPER_CSV_FILES
from tests.analysis.conftest import save, trained, weights

THRESHOLDS, RELATIVE = ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4"), ("1e-4", "1e-3", "1e-2")
TOP = {"0p1pct": 0.001, "1pct": 0.01, "5pct": 0.05}
RATIOS = {"1pct": 0.01, "5pct": 0.05, "10pct": 0.1, "20pct": 0.2}
TINY = 1e-12  # added to every divisor


def run(folder, source, after, **options):
    """Tables by file name, as text; the output folder is under "folder"."""
    out = folder / "out"
    paths = [save(folder / side, {n: t.clone() for n, t in w.items()}) for side, w in (("a", source), ("b", after))]
    analyze(*paths, out, paper_csv=True, report=False, **options)
    result = {path.name: list(csv.DictReader(path.open(encoding="utf-8"))) for path in out.glob("*.csv")}
    return {**result, "folder": out}


def visible(source, after):
    """W, W' and delta in bf16."""
    w, v = source.bfloat16(), after.bfloat16()
    return w, v, v - w


def shares(source, after) -> dict[str, float]:
    w, _, d = visible(source, after)
    n = max(d.numel(), 1)
    rms = float((w.double().square().sum() / n).sqrt())
    result = {"frac_delta_eq_0": int((d == 0).sum()) / n}
    for t in THRESHOLDS:
        result[f"frac_abs_delta_lt_{t}"] = int((d.abs() < float(t)).sum()) / n
        close = torch.isclose(d, torch.zeros_like(d), atol=float(t))
        result[f"frac_isclose_zero_atol_{t}"] = int(close.sum()) / n
    for t in RELATIVE:
        result[f"frac_abs_delta_lt_{t}_src_rms"] = int((d.abs() < float(t) * max(rms, TINY)).sum()) / n
    return result


def sizes(source, after) -> dict[str, float]:
    w, v, d = (t.double().flatten() for t in visible(source, after))
    n, energy = max(len(d), 1), [float(t.square().sum()) for t in (w, v, d)]
    norm = [math.sqrt(e) for e in energy]
    result = {f"{side}_energy": e for side, e in zip(("src", "opd", "delta"), energy, strict=True)}
    result |= {f"{side}_fro_norm": x for side, x in zip(("src", "opd", "delta"), norm, strict=True)}
    result |= {f"{side}_rms": math.sqrt(e / n) for side, e in zip(("src", "opd", "delta"), energy, strict=True)}
    result |= {"relative_delta_fro": norm[2] / (norm[0] + TINY), "delta_l2_norm": norm[2]}
    result |= {"delta_linf_norm": float(d.abs().max()) if len(d) else 0.0, "delta_mean_abs": float(d.abs().sum()) / n}
    largest = d.abs().sort(descending=True).values
    for label, p in TOP.items():
        k = max(1, math.ceil(p * len(d)))
        top = float(largest[:k].square().sum())
        result[f"coord_top_{label}_energy_ratio"] = top / energy[2] if energy[2] else math.nan
    return result


def number(cell: str) -> float:
    return float(cell) if cell else math.nan


def mixed(dtype):
    """Tensors of all numbers of dimensions, an empty one, an unchanged one, one with ties, and a pair of two dtypes."""
    source, generator = weights(dtype), torch.Generator().manual_seed(5)
    source["model.layers.0.extra.scalar"] = torch.tensor(0.5, dtype=dtype)
    source["model.layers.0.extra.nothing"] = torch.zeros(0, 7, dtype=dtype)
    source["model.layers.1.extra.filter"] = torch.randn(3, 4, 5, generator=generator).to(dtype)
    source["model.layers.1.extra.tied"] = torch.full((20, 30), 0.01, dtype=dtype)
    after = trained(source)
    after["lm_head.weight"] = source["lm_head.weight"].clone()
    after["model.embed_tokens.weight"] = after["model.embed_tokens.weight"].float()
    return source, after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensor_rows_match_comparisons_in_bf16(dtype, tmp_path):
    source, after = mixed(dtype)
    rows = run(tmp_path, source, after)["tensor_metrics.csv"]
    assert [row["name"] for row in rows] == sorted(source)
    for row in rows:
        w, v = source[row["name"]], after[row["name"]]
        assert (json.loads(row["shape"]), int(row["ndim"]), int(row["numel"])) == (list(w.shape), w.ndim, w.numel())
        assert (row["analysis_dtype"], row["has_nan_or_inf"]) == ("bfloat16", "False")
        assert {name: float(row[name]) for name in shares(w, v)} == shares(w, v)
        for name, expected in sizes(w, v).items():
            # Sums in double in another order: n terms of one sign.
            assert number(row[name]) == pytest.approx(expected, rel=w.numel() * 2.0**-52, nan_ok=True), (
                row["name"],
                name,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_near_zero_rows_are_means_over_tie_breaks(dtype, tmp_path):
    source, after = mixed(dtype)
    rows = run(tmp_path, source, after)["mask_overlap_metrics.csv"]
    matrices = [name for name in sorted(source) if source[name].ndim == 2]
    assert [(row["name"], float(row["update_mask_atol"])) for row in rows] == [
        (m, a) for m in matrices for a in (0, 1e-5)
    ]
    for row in rows:
        w, _, d = (t.float().flatten() for t in visible(source[row["name"]], after[row["name"]]))
        changed, n = d.abs() > float(row["update_mask_atol"]), len(d)
        count = int(changed.sum())
        assert (int(row["numel"]), int(row["update_count"]), row["mask_overlap_mode"]) == (n, count, "exact")
        assert float(row["update_density"]) == count / max(n, 1)
        for label, r in RATIOS.items():

            def get(figure, row=row, label=label):
                return number(row[f"low_magnitude_{label}_{figure}"])

            if not n:
                assert get("density") == 0
                assert math.isnan(get("covered_by_update_ratio"))
                continue
            k = max(1, math.ceil(r * n))
            threshold = w.abs().sort().values[k - 1]
            sure, tied = int((changed & (w.abs() < threshold)).sum()), w.abs() == threshold
            free = k - int((w.abs() < threshold).sum())  # coordinates of the mask that are chosen among the ties
            both = sure + free * int((changed & tied).sum()) / int(tied.sum())
            assert get("density") == k / n
            assert get("covered_by_update_ratio") == pytest.approx(both / k)
            assert get("update_overlap_ratio") == pytest.approx(both / count if count else math.nan, nan_ok=True)
            enrichment = both / count / (k / n + TINY) if count else math.nan
            assert get("enrichment_vs_random") == pytest.approx(enrichment, nan_ok=True)


def test_columns_are_the_documented_ones(pair, tmp_path):
    analyze(*pair, tmp_path, paper_csv=True, report=False)

    def header(name):
        with open(tmp_path / name, encoding="utf-8") as file:
            return next(csv.reader(file))

    where = ["layer_id", "module_type", "block_type"]
    below = [f"frac_abs_delta_lt_{t}" for t in THRESHOLDS]
    relative = [f"frac_abs_delta_lt_{t}_src_rms" for t in RELATIVE]
    close = [f"frac_isclose_zero_atol_{t}" for t in THRESHOLDS]
    top = [f"coord_top_{label}_energy_ratio" for label in TOP]
    tensors = [
        "name",
        "shape",
        "ndim",
        "numel",
        "analysis_dtype",
        *where,
        "src_fro_norm",
        "opd_fro_norm",
        "delta_fro_norm",
        "relative_delta_fro",
        "delta_l2_norm",
        "delta_linf_norm",
        "delta_mean_abs",
        "delta_rms",
        "src_rms",
        "opd_rms",
        "has_nan_or_inf",
        "src_energy",
        "opd_energy",
        "delta_energy",
        "frac_delta_eq_0",
        *(name for both in zip(below, close, strict=True) for name in both),
        *relative,
        *top,
    ]
    figures = ("density", "update_overlap_ratio", "covered_by_update_ratio", "enrichment_vs_random")
    assert header("tensor_metrics.csv") == tensors
    assert header("top_delta_tensors.csv") == [*tensors, "delta_energy_share"]
    assert header("mask_overlap_metrics.csv") == [
        "name",
        "shape",
        *where,
        "mask_overlap_mode",
        "update_mask_atol",
        "numel",
        "update_count",
        "update_density",
        *(f"low_magnitude_{label}_{figure}" for label in RATIOS for figure in figures),
        *(
            name
            for label in RATIOS
            for name in (
                f"principal_rank_{label}",
                *(
                    f"{mask}_{label}_{f}"
                    for mask in ("principal", "principal_not_low", "nonprincipal_or_low")
                    for f in figures
                ),
                f"principal_low_intersection_density_{label}",
            )
        ),
    ]
    projections = [f"{side}principal_projection_energy_ratio" for side in ("", "left_", "right_")]
    assert header("base_geometry_metrics.csv") == [
        "name",
        "shape",
        *where,
        "base_geometry_mode",
        *(f"{name}_{label}" for label in RATIOS for name in (*projections, "top_subspace_rotation")),
        "spectral_drift_l2_ratio",
        "spectral_drift_to_delta_fro_ratio",
        "skipped_reason",
    ]
    assert header("svd_metrics.csv") == [
        "name",
        "shape",
        *where,
        "matrix_m",
        "matrix_n",
        "min_dim",
        "spectral_norm",
        "spectral_fro_ratio",
        "stable_rank",
        "effective_rank_entropy",
        *(f"rank{pct}_tol_1e_{t}" for t in (6, 5, 4) for pct in ("", "_pct")),
        *(f"top{k}_energy_ratio" for k in (1, 2, 4, 8, 16, 32, 64)),
        *(f"top{p}pct_energy_ratio" for p in (1, 5, 10)),
        "svd_mode",
    ]
    for name, keys in (("layer", where[:1]), ("module", where[1:2]), ("block", where[2:]), ("layer_module", where[:2])):
        assert header(f"{name}_summary.csv") == [
            *keys,
            "num_tensors",
            "total_numel",
            "total_delta_energy",
            "delta_energy_share",
            "total_src_energy",
            "group_relative_delta",
            *below,
            *relative,
            "frac_delta_eq_0",
            *close,
            *top,
        ]
    assert header("failed_tensors.csv") == ["name", "stage", "error_message", "traceback_short"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("layer", ["layer_id"]),
        ("module", ["module_type"]),
        ("block", ["block_type"]),
        ("layer_module", ["layer_id", "module_type"]),
    ],
)
def test_groups_sum_tensors_and_are_sorted_by_energy(name, keys, tmp_path):
    result = run(tmp_path, *mixed(torch.bfloat16))
    tensors, groups = result["tensor_metrics.csv"], result[f"{name}_summary.csv"]
    assert len(groups) == len({tuple(row[k] for k in keys) for row in tensors})
    energies = [float(group["total_delta_energy"]) for group in groups]
    assert energies == sorted(energies, reverse=True)
    everything = math.fsum(float(row["delta_energy"]) for row in tensors)
    for group in groups:
        members = [row for row in tensors if all(row[k] == group[k] for k in keys)]

        def total(of, members=members):
            return math.fsum(float(row[of]) for row in members)

        assert (int(group["num_tensors"]), int(group["total_numel"])) == (len(members), total("numel"))
        assert float(group["total_delta_energy"]) == pytest.approx(total("delta_energy"))
        assert float(group["total_src_energy"]) == pytest.approx(total("src_energy"))
        assert float(group["delta_energy_share"]) == pytest.approx(total("delta_energy") / (everything + TINY))
        ratio = math.sqrt(total("delta_energy")) / (math.sqrt(total("src_energy")) + TINY)
        assert float(group["group_relative_delta"]) == pytest.approx(ratio)
        for figure in [c for c in group if c.startswith(("frac_", "coord_top_"))]:
            weight = "numel" if figure.startswith("frac_") else "delta_energy"
            known = [
                (float(row[figure]), float(row[weight])) for row in members if row[figure] and float(row[weight]) > 0
            ]
            mean = math.fsum(x * w for x, w in known) / math.fsum(w for _, w in known) if known else math.nan
            assert number(group[figure]) == pytest.approx(mean, nan_ok=True), figure


def test_top_tensors_are_sorted_and_limited(tmp_path):
    source = {f"t.{i}": torch.ones(3) for i in range(120)}
    after = {name: w + (1 + i) / 128 for i, (name, w) in enumerate(source.items())}
    rows = run(tmp_path, source, after)["top_delta_tensors.csv"]
    assert [row["name"] for row in rows] == [f"t.{i}" for i in range(119, 19, -1)]
    everything = sum((1 + i) ** 2 for i in range(120))
    assert float(rows[0]["delta_energy_share"]) == pytest.approx(120**2 / everything)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj", "attention")),
        ("model.layers.3.self_attn.qkv_proj.weight", (3, "v_proj", "attention")),  # as a substring
        ("model.layers.3.mlp.gate_up_proj.weight", (3, "up_proj", "mlp")),
        ("model.layers.3.self_attn.q_norm.weight", (3, "norm", "norm")),
        ("model.layers.3.self_attn.q_proj.bias", (3, "q_proj", "attention")),
        ("model.language_model.layers.12.post_attention_layernorm.weight", (12, "norm", "norm")),
        ("layers.1.encoder.model.layers.2.mlp.down_proj", (2, "down_proj", "mlp")),
        ("transformer.h.7.ln_1.weight", (7, "norm", "norm")),
        ("h.7.attn.c_attn.weight", (-1, "other", "other")),
        ("visual.blocks.5.mlp.fc1.weight", (5, "fc1", "mlp")),
        ("blocks.5.experts.w3", (5, "w3", "mlp")),
        ("blocks.5.pw3.weight", (5, "other", "other")),  # a whole token or nothing
        ("transformer.wte.weight", (-1, "embed_tokens", "embedding")),
        ("MODEL.EMBED_TOKENS.WEIGHT", (-1, "embed_tokens", "embedding")),
        ("lm_head.weight", (-1, "lm_head", "lm_head")),
        ("model.layers.x.weight", (-1, "other", "other")),
        ("layers." + "9" * 5000 + ".weight", (-1, "other", "other")),
        ("", (-1, "other", "other")),
    ],
)
def test_module_names_follow_the_paper_script(name, where):
    assert tuple(paper_csv.place(name).values()) == where


def test_matching_uses_names_and_three_prefixes(tmp_path):
    ones = torch.ones(4, 6)
    source = {
        "same": ones,
        "language_model.layers.0.x": ones,
        "model.visual.y": ones,
        "model.language_model.z": ones,
        "module.wrapped": ones,
        "only_source": ones,
        "transposed": ones,
        "model.embed_tokens.weight": ones,
        "count": torch.arange(3),
        "model.layers.0.self_attn.qkv_proj.weight": torch.ones(12, 6),
    }
    after = {
        "same": ones,
        "model.layers.0.x": ones,
        "visual.y": ones,
        "model.z": ones,
        "wrapped": ones,
        "only_trained": ones,
        "transposed": torch.ones(6, 4),
        "model.embed_tokens.weight": torch.ones(5, 6),
        "count": torch.arange(3),
        **{f"model.layers.0.self_attn.{m}_proj.weight": ones for m in "qkv"},
    }
    result = run(tmp_path, source, after)
    names = ["language_model.layers.0.x", "model.language_model.z", "model.visual.y", "same"]
    assert [row["name"] for row in result["tensor_metrics.csv"]] == names
    assert result["failed_tensors.csv"] == []
    report = json.loads((result["folder"] / "mismatch_report.json").read_text())
    assert report == {
        "exact_matches": 4,
        "alias_matches": 3,
        "alias_examples": [
            {"src": "language_model.layers.0.x", "opd": "model.layers.0.x"},
            {"src": "model.language_model.z", "opd": "model.z"},
            {"src": "model.visual.y", "opd": "visual.y"},
        ],
        "ambiguous_alias_matches": [],
        "missing_in_src": sorted({"wrapped", "only_trained", *(n for n in after if "_proj" in n)}),
        "missing_in_opd": sorted({"module.wrapped", "only_source", *(n for n in source if "_proj" in n)}),
        "shape_mismatched": [
            {
                "src_name": name,
                "opd_name": name,
                "src_shape": list(source[name].shape),
                "opd_shape": list(after[name].shape),
            }
            for name in ("model.embed_tokens.weight", "transposed")
        ],
        "skipped_non_floating": 1,
    }


def test_ambiguous_names_are_reported():
    result, report = paper_csv.match_names(["language_model.a", "model.language_model.a", "b"], ["model.a", "b"])
    assert result == [("b", "b")]
    assert report["ambiguous_alias_matches"] == [
        {
            "canonical_key": "model.a",
            "src_keys": ["language_model.a", "model.language_model.a"],
            "opd_keys": ["model.a"],
        }
    ]


@pytest.mark.parametrize("side", ["source", "trained"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_tensors_have_fractions_but_no_norms(side, value, tmp_path):
    source, name = weights(), "model.layers.0.mlp.down_proj.weight"
    after = trained(source)
    bias = "model.layers.1.self_attn.q_proj.bias"
    for key in (name, bias):
        {"source": source, "trained": after}[side][key].view(-1)[3] = value
    result = run(tmp_path, source, after)
    rows = {row["name"]: row for row in result["tensor_metrics.csv"]}
    unknown = set(sizes(source[name], after[name])) | {f"frac_abs_delta_lt_{t}_src_rms" for t in RELATIVE}
    for key in (name, bias):
        assert rows[key]["has_nan_or_inf"] == "True"
        assert all(rows[key][column] == "" for column in unknown)
        known = {c: share for c, share in shares(source[key], after[key]).items() if c not in unknown}
        assert {c: float(rows[key][c]) for c in known} == known
    assert [(row["name"], row["stage"]) for row in result["failed_tensors.csv"]] == [(name, "mask_overlap")]
    assert name not in {row["name"] for row in result["mask_overlap_metrics.csv"]}
    assert [row["name"] for row in result["top_delta_tensors.csv"]][-2:] == [name, bias]
    layers = {row["layer_id"]: row for row in result["layer_summary.csv"]}
    finite = math.fsum(float(r["delta_energy"]) for r in rows.values() if r["layer_id"] == "0" and r["delta_energy"])
    assert float(layers["0"]["total_delta_energy"]) == pytest.approx(finite)
    summary = json.loads((result["folder"] / "paper_summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["warnings"]["failed_tensors"] == 1


def test_tensors_of_one_storage_have_one_row_each(tmp_path):
    for side, shift in (("a", 0.0), ("b", 1e-3)):
        shared = torch.linspace(-1, 1, 24).reshape(4, 6) + shift
        torch.save(
            {"model.embed_tokens.weight": shared, "lm_head.weight": shared, "x": torch.ones(2)}, tmp_path / f"{side}.pt"
        )
    analyze(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "out", paper_csv=True, report=False)
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out" / "tensor_metrics.csv").open())}
    assert list(rows) == ["lm_head.weight", "model.embed_tokens.weight", "x"]
    columns = ("name", "module_type", "block_type")
    head, embedding = ({k: v for k, v in rows[n].items() if k not in columns} for n in list(rows)[:2])
    assert head == embedding


def test_failed_and_tied_tensors_are_listed(pair, tmp_path):
    opened, result = open_pair(*pair), analyze(*pair)
    try:
        first, second, *rest = result.records
        result.records = [
            dataclasses.replace(first, tally=None, failure="MemoryError: no room"),
            dataclasses.replace(second, how="tied"),
            *rest,
        ]
        paper_csv.write(tmp_path, opened, result)
    finally:
        opened.close()
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "failed_tensors.csv").open())}
    assert set(rows) == {first.name, second.name}
    assert {row["stage"] for row in rows.values()} == {"delta_metrics"}
    assert (rows[first.name]["error_message"], rows[first.name]["traceback_short"]) == (
        "no room",
        "MemoryError: no room",
    )
    analysed = {row["name"] for row in csv.DictReader((tmp_path / "tensor_metrics.csv").open())}
    assert analysed == set(weights()) - set(rows)


@pytest.mark.parametrize("name", ["=cmd()|x", "+1", "-1", "@a", 'a,"b"', "a\nb", "../../x", "<b>"])
def test_names_are_single_cells_and_no_formulas(name, tmp_path):
    result = run(
        tmp_path, {name: torch.ones(4, 4), "z": torch.zeros(2)}, {name: torch.full((4, 4), 2.0), "z": torch.zeros(2)}
    )
    plain = "'" + name if name[0] in "=+-@" else name
    for file in ("tensor_metrics.csv", "mask_overlap_metrics.csv", "top_delta_tensors.csv"):
        assert plain in {row["name"] for row in result[file]}
    summary = json.loads((result["folder"] / "paper_summary.json").read_text())
    # No spreadsheet reads the JSON: the name has no prefix.
    assert summary["top_20_tensors_by_delta_energy_share"][0]["name"] == name


def test_empty_tables_have_a_header(tmp_path):
    result = run(tmp_path, {"x": torch.zeros(3)}, {"x": torch.zeros(3)})
    assert result["mask_overlap_metrics.csv"] == []
    assert (result["folder"] / "mask_overlap_metrics.csv").read_text().startswith("name,shape,")
    (row,) = result["tensor_metrics.csv"]
    assert (row["frac_delta_eq_0"], row["src_fro_norm"], row["coord_top_1pct_energy_ratio"]) == ("1.0", "0.0", "")


def test_summary_agrees_with_the_tables(tmp_path):
    result = run(tmp_path, *mixed(torch.bfloat16))
    summary = json.loads((result["folder"] / "paper_summary.json").read_text())
    tensors, masks = result["tensor_metrics.csv"], result["mask_overlap_metrics.csv"]
    numel = sum(int(row["numel"]) for row in tensors)
    assert (summary["total_tensors_analyzed"], summary["total_parameters_analyzed"]) == (len(tensors), numel)
    total = {side: math.sqrt(math.fsum(float(row[f"{side}_energy"]) for row in tensors)) for side in ("src", "delta")}
    assert summary["global_relative_delta_norm"] == pytest.approx(total["delta"] / (total["src"] + TINY))
    unchanged = math.fsum(float(row["frac_delta_eq_0"]) * int(row["numel"]) for row in tensors) / numel
    assert summary["global_frac_delta_eq_0"] == pytest.approx(unchanged)
    for atol, label in ((0.0, "0"), (1e-5, "1e-5")):
        known = [row for row in masks if float(row["update_mask_atol"]) == atol and int(row["update_count"])]
        overlap = [float(row["low_magnitude_10pct_update_overlap_ratio"]) for row in known]
        counts = [int(row["update_count"]) for row in known]
        key = f"low_magnitude_10pct_update_overlap_ratio_update_atol_{label}"
        assert summary[f"mean_{key}"] == pytest.approx(sum(overlap) / len(overlap))
        middle = sorted(overlap)[(len(overlap) - 1) // 2 : len(overlap) // 2 + 1]
        assert summary[f"median_{key}"] == pytest.approx(sum(middle) / len(middle))
        weighted = sum(x * n for x, n in zip(overlap, counts, strict=True)) / sum(counts)
        assert summary[f"update_weighted_mean_{key}"] == pytest.approx(weighted)
    assert [row["module_type"] for row in summary["top_10_module_types_by_delta_energy_share"]] == [
        row["module_type"] for row in result["module_summary.csv"]
    ][:10]


def test_files_are_deterministic_and_removed_by_overwrite(pair, tmp_path):
    analyze(*pair, tmp_path / "a", paper_csv=True, report=False, threads=1)
    analyze(*pair, tmp_path / "b", paper_csv=True, report=False, threads=2, io="read")
    analyze(*pair, tmp_path / "b", paper_csv=True, report=False)
    for name in PAPER_CSV_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    analyze(*pair, tmp_path / "c", report=False)
    written = {path.name for path in (tmp_path / "a").iterdir()} - {path.name for path in (tmp_path / "c").iterdir()}
    assert written == set(PAPER_CSV_FILES)
    analyze(*pair, tmp_path / "a", report=False, overwrite=True)
    assert not written & {path.name for path in (tmp_path / "a").iterdir()}
