from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from opdkernels import InputError, UsageError
from opdkernels.masks import Mask, MaskSet
from opdkernels.patch import graft
from opdkernels.patch.graft import select_names
from tests.patch.conftest import changed, hashes, save, some

NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    "model.norm.weight",
)


@pytest.fixture
def pair(tmp_path, short_segments):
    base = {name: some((400, 333), torch.bfloat16, i) for i, name in enumerate(NAMES)}
    trained = {name: changed(tensor, 0.3, i) for i, (name, tensor) in enumerate(base.items())}
    folders = [
        save(tmp_path / kind, tensors, 2, config__json=b'{"model_type": "qwen2"}')
        for kind, tensors in (("base", base), ("trained", trained))
    ]
    return (*folders, base, trained)


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("invert", [False, True])
def test_graft_takes_masked_coordinates_and_invert_the_others(pair, tmp_path, invert):
    base, trained, before, after = pair
    torch.manual_seed(0)
    active = {name: torch.rand(400, 333) < 0.2 for name in NAMES[:4]}
    active[NAMES[0]][:] = False
    masks = MaskSet({name: Mask.from_bool(selected) for name, selected in active.items()})
    result = graft(base, trained, tmp_path / "out", masks=masks, invert=invert)
    kept = 0
    for name, tensor in tensors_of(tmp_path / "out").items():
        taken = active.get(name, torch.zeros(400, 333, dtype=torch.bool)) ^ invert
        expected = torch.where(taken, after[name].view(torch.int16), before[name].view(torch.int16))
        assert torch.equal(tensor.view(torch.int16), expected)
        kept += int((expected != before[name].view(torch.int16)).sum())
    assert result["kept"] == kept
    assert result["changed"] == sum(
        int((after[name].view(torch.int16) != before[name].view(torch.int16)).sum()) for name in NAMES
    )


def test_files_are_those_of_the_trained_checkpoint(pair, tmp_path):
    base, trained, _, _ = pair
    graft(base, trained, tmp_path / "all", select="layers=0-2,attention,mlp,embedding,norm")
    graft(base, trained, tmp_path / "most", select="attention,mlp,embedding,norm")
    graft(base, trained, tmp_path / "none", select="attention,mlp,embedding,norm", invert=True)
    assert hashes(tmp_path / "most") == hashes(trained)
    assert {n: h for n, h in hashes(tmp_path / "none").items() if n.endswith(".safetensors")} == {
        n: h for n, h in hashes(base).items() if n.endswith(".safetensors")
    }
    assert hashes(tmp_path / "all") != hashes(trained)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("attention", [1, 3, 5]),
        ("up_proj", [2, 4, 6]),
        ("layer=1", [3, 4]),
        ("layers=1-2,mlp", [4, 6]),
        ("layer=0,layer=2,attention,mlp", [1, 2, 5, 6]),
        ("embedding,norm", [0, 7]),
        ("attention,up_proj", range(1, 7)),
        ("mlp,q_proj,layer=1", [3, 4]),
        ("", range(8)),
    ],
)
def test_tensors_are_selected_by_layer_and_module(select, expected):
    assert select_names(list(NAMES), select.split(",") if select else []) == {NAMES[i] for i in expected}


def test_help_says_how_terms_combine():
    from typer.testing import CliRunner

    from opdkernels.cli import app

    output = CliRunner().invoke(app, ["graft", "--help"]).output.replace("│", " ")
    assert "Blocks and modules add up; with layers, both must match." in " ".join(output.split())


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (
            "lm_head",
            "no tensor is 'lm_head'; give one of attention, embed_tokens, embedding, mlp, norm, q_proj, up_proj, "
            "layers=0-2",
        ),
        ("layers=7", "no tensor is 'layers=7'; give one of .* layers=0-2"),
        ("layers=2-1", "no tensor is 'layers=2-1'; give"),
        ("norm,layer=1", "no tensor is all of 'norm, layer=1'"),
    ],
)
def test_a_selection_without_tensors_is_an_error(select, message):
    with pytest.raises(UsageError, match=message):
        select_names(list(NAMES), select.split(","))


def test_mismatched_inputs_are_rejected_and_leave_no_output(pair, tmp_path):
    base, trained, before, _ = pair
    out = tmp_path / "out"
    for masks, message in (
        ({"model.layers.9.mlp.up_proj.weight": (400, 333)}, "mask for model.layers.9.mlp.up_proj.weight, which"),
        ({NAMES[1]: (4, 4)}, r"has shape \[4, 4\] and the tensor \[400, 333\]"),
    ):
        with pytest.raises(InputError, match=message):
            graft(
                base,
                trained,
                out,
                masks=MaskSet(
                    {name: Mask.from_bool(torch.ones(shape, dtype=torch.bool)) for name, shape in masks.items()}
                ),
            )
    for nothing in ("", " , "):
        with pytest.raises(UsageError, match="give masks, or select"):
            graft(base, trained, out, select=nothing)
    other = save(tmp_path / "other", {"x": torch.zeros(3)})
    with pytest.raises(InputError, match="have no tensor name in common"):
        graft(other, trained, out, select="mlp")
    wide = save(tmp_path / "wide", {**before, NAMES[2]: before[NAMES[2]].float()})
    with pytest.raises(InputError, match="save both in one dtype and shape"):
        graft(wide, trained, out, select="mlp")
    with pytest.raises(InputError, match="is an input of this command"):
        graft(base, trained, trained, select="mlp")
    assert not out.exists()


def test_tensors_missing_from_the_base_are_kept(tmp_path):
    base = save(tmp_path / "base", {"a.mlp.up_proj.weight": some((5, 3), torch.float32, 0)})
    trained = save(
        tmp_path / "trained",
        {
            "a.mlp.up_proj.weight": some((5, 3), torch.float32, 1),
            "b.q_proj.weight": some((2, 2), torch.int64, 2),
            "c": some((), torch.bfloat16, 3),
            "d": some((0,), torch.bfloat16, 3),
        },
    )
    assert graft(base, trained, tmp_path / "out", select=" mlp ,", invert=True)["unmatched"] == [
        "b.q_proj.weight",
        "c",
        "d",
    ]
    with pytest.raises(InputError, match=r"the base lacks b\.q_proj\.weight, which is selected"):
        graft(base, trained, tmp_path / "other", select="q_proj")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        bits(result["a.mlp.up_proj.weight"]), bits(load_file(f"{base}/model.safetensors")["a.mlp.up_proj.weight"])
    )
    for name in ("b.q_proj.weight", "c", "d"):
        assert torch.equal(bits(result[name]), bits(load_file(f"{trained}/model.safetensors")[name]))


def test_wrapper_prefixes_are_ignored_when_matching_names(tmp_path):
    base = save(
        tmp_path / "base",
        {
            "language_model.layers.0.mlp.up_proj.weight": some((5, 3), torch.bfloat16, 0),
            "lm_head.weight": some((2,), torch.bfloat16, 1),
        },
    )
    trained = save(
        tmp_path / "trained",
        {
            "model.language_model.layers.0.mlp.up_proj.weight": some((5, 3), torch.bfloat16, 2),
            "lm_head.weight": some((2,), torch.bfloat16, 3),
        },
    )
    result = graft(base, trained, tmp_path / "out", select="mlp", invert=True)
    assert result["unmatched"] == []
    grafted = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        bits(grafted["model.language_model.layers.0.mlp.up_proj.weight"]), bits(some((5, 3), torch.bfloat16, 0))
    )
    assert torch.equal(bits(grafted["lm_head.weight"]), bits(some((2,), torch.bfloat16, 3)))


def test_graft_writes_pytorch_files_as_safetensors(tmp_path):
    for seed, kind in enumerate(("base", "trained")):
        (tmp_path / kind).mkdir()
        torch.save(
            {"up_proj.weight": some((30, 4), torch.bfloat16, seed), "q_proj.weight": some((3,), torch.float32, seed)},
            tmp_path / kind / "pytorch_model.bin",
        )
    result = graft(tmp_path / "base", tmp_path / "trained", tmp_path / "out", select="mlp")
    assert result["files"] == ["model.safetensors"]
    grafted = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(bits(grafted["up_proj.weight"]), bits(some((30, 4), torch.bfloat16, 1)))
    assert torch.equal(bits(grafted["q_proj.weight"]), bits(some((3,), torch.float32, 0)))


def test_a_copy_of_a_tensor_is_grafted_with_that_tensor_and_names_may_have_prefixes(tmp_path):
    embed, head, up = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    before = {embed: some((40, 3), torch.bfloat16, 1), up: some((5, 3), torch.bfloat16, 2)}
    after = {name: changed(tensor, 0.5, 3) for name, tensor in before.items()}
    base = save(tmp_path / "base", {name.removeprefix("model."): tensor for name, tensor in before.items()})
    trained = save(tmp_path / "trained", {**after, head: after[embed].clone()})
    active = {embed.removeprefix("model."): torch.rand(40, 3) < 0.5}
    masks = MaskSet({name: Mask.from_bool(mask) for name, mask in active.items()})
    result = graft(base, trained, tmp_path / "out", masks=masks)
    written = tensors_of(tmp_path / "out")
    expected = torch.where(*active.values(), after[embed], before[embed])
    assert torch.equal(bits(written[embed]), bits(expected))
    assert torch.equal(bits(written[head]), bits(expected))
    assert torch.equal(bits(written[up]), bits(before[up]))
    assert result["coverage"]["complete"]


def test_graft_reports_how_much_has_a_counterpart(tmp_path):
    base = save(tmp_path / "base", {"a.weight": some((6, 5), torch.bfloat16, 1), "b": some((2,), torch.bfloat16, 2)})
    trained = save(
        tmp_path / "trained", {"a.weight": some((6, 5), torch.bfloat16, 3), "c": some((10,), torch.bfloat16, 2)}
    )
    masks = MaskSet({"a.weight": Mask.from_bool(torch.ones(6, 5, dtype=torch.bool))})
    coverage = graft(base, trained, tmp_path / "out", masks=masks)["coverage"]
    assert (coverage["compared"], coverage["parameters"]) == (30, {"base": 32, "trained": 40})
    assert not coverage["sufficient"]


@pytest.mark.parametrize("side", ["base", "trained"])
def test_adapters_are_refused_as_they_change_other_tensors(tmp_path, side):
    name = "model.layers.0.mlp.up_proj"
    weights = {kind: {f"{name}.weight": some((6, 5), torch.bfloat16, i)} for i, kind in enumerate(("base", "trained"))}
    weights[side] = {f"base_model.model.{name}.base_layer.weight": weights[side][f"{name}.weight"]}
    weights[side][f"base_model.model.{name}.lora_A.default.weight"] = some((2, 5), torch.bfloat16, 3)
    base, trained = (save(tmp_path / kind, tensors) for kind, tensors in weights.items())
    with pytest.raises(InputError, match=r"lora_A\.default\.weight belongs to a LoRA adapter, .*merge_and_unload"):
        graft(base, trained, tmp_path / "out", select="mlp")
    assert not (tmp_path / "out").exists()
