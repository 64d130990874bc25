"""What UpdateTracker measures, against plain comparisons of the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opdkernels import InputError, UpdateTracker, UsageError, analyze
from opdkernels.masks.mask_set import from_bools
from opdkernels.tracking import weights as tracked
from opdkernels.tracking.tracker import SLICE

ROOT = Path(__file__).parent.parent.parent
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def model_of(dtype=torch.bfloat16, seed=0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.Tanh(), torch.nn.Linear(31, 7)).to(dtype)


def copy_of(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@torch.no_grad()
def update(model, seed, scale=1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param += (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def changed(model, start) -> dict[str, torch.Tensor]:
    """Where the bf16 value differs from that at the start."""
    return {name: param.detach().bfloat16() != start[name].bfloat16() for name, param in model.named_parameters()}


def fraction(flags: dict[str, torch.Tensor]) -> float:
    return sum(int(flag.sum()) for flag in flags.values()) / sum(flag.numel() for flag in flags.values())


def norm(tensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_equal_a_plain_comparison(dtype):
    model = model_of(dtype)
    start = copy_of(model)
    generator = torch.Generator().manual_seed(5)
    active = {name: torch.rand(param.shape, generator=generator) < 0.3 for name, param in start.items()}
    tracker = UpdateTracker(masks=active, prefix="")
    tracker.start(model)
    ever = {name: torch.zeros_like(flag) for name, flag in active.items()}
    for step in range(3):
        update(model, step)
        values, flags = tracker.measure(model), changed(model, start)
        ever = {name: ever[name] | flag for name, flag in flags.items()}
        both = {name: flag & active[name] for name, flag in flags.items()}
        wide = {
            name: param.detach().to(torch.promote_types(dtype, torch.float32))
            for name, param in model.named_parameters()
        }
        assert values["changed_visible"] == fraction(flags)
        assert values["changed_any"] == fraction(ever)
        assert values["recall_vs_changed_any"] == pytest.approx(fraction(flags) / fraction(ever))
        assert values["mask_recall"] == pytest.approx(fraction(both) / fraction(active))
        assert values["mask_precision"] == pytest.approx(fraction(both) / fraction(flags))
        assert values["update_norm"] == pytest.approx(norm(wide[name] - start[name] for name in start), rel=1e-6)
        assert values["relative_norm"] == pytest.approx(values["update_norm"] / norm(start.values()), rel=1e-6)
        assert "nonfinite" not in values
    assert 0 < fraction(flags) < fraction(ever) < 1 or dtype != torch.bfloat16


def test_metrics_equal_those_of_analyze():
    """On the weights of a real run."""
    files = [ROOT / "examples" / "opd_sample" / f"{name}.safetensors" for name in ("base", "seed1")]
    start, trained = map(load_file, files)
    model = torch.nn.ParameterDict({name.replace(".", "/"): torch.nn.Parameter(w) for name, w in start.items()})
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    with torch.no_grad():
        for name, param in model.items():
            param.copy_(trained[name.replace("/", ".")])
    values = tracker.measure(model)
    visible = analyze(*files, spectra="off").summary["views"]["visible"]
    assert values["changed_visible"] == pytest.approx(1 - visible["frac_zero"], rel=1e-12)
    assert values["relative_norm"] == pytest.approx(visible["relative_norm"], rel=1e-6)


def test_coordinates_that_return_are_in_changed_any_only():
    model = model_of()
    start = copy_of(model)
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    with torch.no_grad():
        model[0].weight[0] += 1
    tracker.measure(model)
    model.load_state_dict(start)
    values = tracker.measure(model)
    assert (values["changed_visible"], values["update_norm"], values["recall_vs_changed_any"]) == (0, 0, 0)
    assert values["changed_any"] == 13 / sum(weight.numel() for weight in start.values())


def test_an_update_below_bf16_is_invisible_but_has_a_norm():
    model = model_of(torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    update(model, 0, scale=1e-9)
    values = tracker.measure(model)
    assert values["changed_visible"] < 0.01
    assert values["update_norm"] > 0


def test_a_new_model_has_changed_nothing():
    model = model_of()
    tracker = UpdateTracker(masks={"0.weight": torch.zeros(31, 13, dtype=torch.bool)}, prefix="")
    tracker.start(model)
    values = tracker.measure(model)
    assert {name: value for name, value in values.items() if name != "tracker_seconds"} == {
        "update_norm": 0.0,
        "changed_visible": 0.0,
        "changed_any": 0.0,
        "relative_norm": 0.0,
    }  # ratios over nothing are absent


def test_non_finite_weights_are_reported_and_do_not_count_as_changed():
    model = model_of()
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    with torch.no_grad():
        model[0].weight[0, :5] = float("nan")
    values = tracker.measure(model)
    total = sum(param.numel() for param in model.parameters())
    assert (values["nonfinite"], values["changed_visible"]) == (5 / total, 0)
    assert math.isfinite(values["update_norm"])


def test_frozen_parameters_are_skipped_and_tied_ones_count_once():
    model = model_of()
    model[2].requires_grad_(False)
    model.add_module("again", torch.nn.Linear(13, 31, bias=False))
    model.again.weight = model[0].weight
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    assert list(tracker._weights) == ["0.weight", "0.bias"]
    with torch.no_grad():
        model[0].bias.add_(1)
        model[2].weight.add_(1)
    assert tracker.measure(model)["changed_visible"] == 31 / (31 * 13 + 31)


def test_memory_is_the_copy_and_the_bits():
    model = model_of()
    numel = [param.numel() for param in model.parameters()]
    bits = sum((n + 7) // 8 for n in numel)
    tracker = UpdateTracker()
    assert tracker.nbytes == 0
    tracker.start(model)
    assert tracker.nbytes == 2 * sum(numel) + bits
    assert tracker._weights["0.weight"].start.untyped_storage().nbytes() == 2 * 31 * 13
    tracker = UpdateTracker(masks={"0.weight": torch.ones(31, 13, dtype=torch.bool)})
    tracker.start(model)
    assert tracker.nbytes == 2 * sum(numel) + 2 * bits


def test_a_stride_compares_a_sample_of_every_row_and_column():
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 512, bias=False).bfloat16()
    start = model.weight.detach().clone()
    flags = torch.rand(512, 256) < 0.3
    tracker = UpdateTracker(stride=16, masks={"weight": flags}, prefix="")
    tracker.start(model)
    (weight,) = tracker._weights.values()
    assert weight.stride == 17
    assert len(weight.start) == -(-512 * 256 // 17)
    assert weight.start.untyped_storage().nbytes() == weight.start.nbytes
    sampled = torch.arange(0, 512 * 256, 17)
    assert len((sampled % 256).unique()) == 256
    assert len((sampled // 256).unique()) == 512
    with torch.no_grad():
        model.weight[flags] += 1
    values = tracker.measure(model)
    assert values["mask_recall"] == values["mask_precision"] == 1
    assert values["changed_visible"] == int(flags.flatten()[sampled].sum()) / len(sampled)
    exact = float((model.weight.detach().double() - start.double()).norm())
    assert values["update_norm"] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("stride", [1, 3])
def test_slices_give_the_same_values(monkeypatch, stride):
    def measured():
        model = model_of()
        tracker = UpdateTracker(masks={"0.weight": torch.eye(31, 13, dtype=torch.bool)}, stride=stride, prefix="")
        tracker.start(model)
        update(model, 0)
        values = tracker.measure(model)
        del values["tracker_seconds"]
        return values

    assert SLICE % 8 == 0
    in_one = measured()
    monkeypatch.setattr("opdkernels.tracking.tracker.SLICE", 16)
    assert measured() == in_one


def test_values_on_the_device_of_the_parameters_are_kept_there():
    model = model_of()
    tracker = UpdateTracker(offload=False, prefix="")
    tracker.start(model)
    update(model, 0)
    assert tracker._weights["0.weight"].start.device == model[0].weight.device
    assert tracker._weights["0.weight"].start.data_ptr() != model[0].weight.data_ptr()
    assert tracker.measure(model)["changed_visible"] > 0


def test_base_is_the_start_of_a_run_that_resumes(tmp_path):
    """Names with and without a prefix, and a tied weight under its other name."""
    model = model_of()
    start = copy_of(model)
    save_file({f"model.{name}": tensor for name, tensor in start.items()}, tmp_path / "base.safetensors")
    update(model, 0)
    tracker = UpdateTracker(base=tmp_path / "base.safetensors", prefix="")
    tracker.start(model)
    assert tracker.measure(model)["changed_visible"] == fraction(changed(model, start)) > 0


def test_base_of_another_model_is_an_error(tmp_path):
    model = model_of()
    start = copy_of(model)
    del start["2.bias"]
    save_file(start, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"no tensor for the parameter 2\.bias of shape \[7\]; give the checkpoint"):
        UpdateTracker(base=tmp_path / "base.safetensors").start(model)
    save_file(copy_of(model) | {"2.bias": torch.zeros(8)}, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"2\.bias is \[8\] in .* and \[7\] in the model"):
        UpdateTracker(base=tmp_path / "base.safetensors").start(model)
    with pytest.raises(InputError, match="nowhere"):
        UpdateTracker(base=tmp_path / "nowhere").start(model)


def test_a_parameter_in_pieces_is_read_in_order(tmp_path):
    """Ranges that begin and end in the middle of stored tensors."""
    save_file({"a": torch.arange(5.0), "b": torch.arange(5.0, 12.0)}, tmp_path / "m.safetensors")
    from opdkernels.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    read = tracked.piecewise_reader(checkpoint, [(0, 4, "a", 1), (4, 7, "b", 0)])
    joined = torch.tensor([1.0, 2, 3, 4, *range(5, 12)])
    for start in range(12):
        for stop in range(start + 1, 12):
            assert torch.equal(read(start, stop), joined[start:stop])
    region = tracked.read_local(lambda start, stop: torch.arange(24.0)[start:stop], (4, 6), (2, 3), (1, 2))
    assert torch.equal(region, torch.arange(24.0).view(4, 6)[1:3, 2:5].flatten())
    rows = tracked.read_local(lambda start, stop: torch.arange(24.0)[start:stop], (4, 6), (2, 6), (1, 0))
    assert torch.equal(rows, torch.arange(6.0, 18.0))
    assert len(tracked.read_local(lambda start, stop: 1 / 0, (4, 6), (0, 6), (4, 0))) == 0
    checkpoint.close()


def test_masks_come_from_a_file_by_the_names_of_a_checkpoint(tmp_path):
    model = model_of()
    active = {f"model.{name}": torch.ones(param.shape, dtype=torch.bool) for name, param in model.named_parameters()}
    from_bools(active).save(tmp_path / "m.safetensors")
    tracker = UpdateTracker(masks=tmp_path / "m.safetensors", prefix="")
    tracker.start(model)
    update(model, 0)
    values = tracker.measure(model)
    assert values["mask_recall"] == values["changed_visible"]
    assert values["mask_precision"] == 1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda model: model.requires_grad_(False), "no trainable parameter"),
        (lambda model: model.to(torch.complex64), r"0\.weight is torch.complex64; UpdateTracker compares"),
        (lambda model: model.to("meta"), r"0\.weight is on the meta device, without data; load the weights"),
        (lambda model: setattr(model[0].weight, "ds_id", 0), "ZeRO-3; use ZeRO-2 or FSDP2"),
    ],
    ids=["frozen", "complex", "meta", "zero3"],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_models_that_cannot_be_compared(prepare, message):
    model = model_of(torch.float32)
    prepare(model)
    with pytest.raises(UsageError, match=message):
        UpdateTracker().start(model)


def test_flattened_parameters_of_fsdp1_are_an_error():
    class FullyShardedDataParallel(torch.nn.Sequential):
        pass

    with pytest.raises(UsageError, match="use FSDP2"):
        UpdateTracker().start(FullyShardedDataParallel(model_of()))


def test_masks_of_another_model_are_an_error():
    with pytest.raises(UsageError, match=r"the first of 1 masks is other\.weight, .*; give masks of this model"):
        UpdateTracker(masks={"other.weight": torch.ones(3, dtype=torch.bool)}).start(model_of())
    with pytest.raises(ValueError, match=r"0\.weight is \[31, 13\], its mask \[31, 14\]"):
        UpdateTracker(masks={"0.weight": torch.ones(31, 14, dtype=torch.bool)}).start(model_of())


def test_calls_out_of_order_are_an_error():
    model = model_of()
    tracker = UpdateTracker()
    with pytest.raises(UsageError, match=r"call start\(model\) before the first step"):
        tracker.measure(model)
    tracker.start(model)
    model[0].bias.requires_grad_(False)
    with pytest.raises(UsageError, match=r"0\.bias is not trainable any more, .*call start\(model\)"):
        tracker.measure(model)
    model[0].bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(UsageError, match=r"0\.bias has 32 coordinates here, and 31 at the start"):
        tracker.measure(model)


@pytest.mark.parametrize("name", ["logging_steps", "stride"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_numbers_out_of_range(name, value):
    with pytest.raises(UsageError, match=rf"{name} is .*; give an integer of at least 1"):
        UpdateTracker(**{name: value})


@pytest.mark.parametrize("attribute", ["module", "_orig_mod"])
def test_names_of_wrappers_do_not_matter(attribute):
    """The same model, wrapped after the start as DDP and torch.compile do."""
    model, wrapper = model_of(), torch.nn.Module()
    setattr(wrapper, attribute, model)
    tracker = UpdateTracker(prefix="")
    tracker.start(model)
    update(model, 0)
    expected = tracker.measure(model)["changed_visible"]
    assert expected > 0
    assert tracker.measure(wrapper)["changed_visible"] == expected
