"""push_to_hub with the real huggingface_hub, against a Hub on localhost."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import opdkernels
from opdkernels import InputError, UsageError, analyze, overlap, push_to_hub, trajectory
from opdkernels.hub import card
from opdkernels.hub.products import product_of
from tests.analysis.conftest import save, trained, weights
from tests.in_process import run_cli

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("yaml")
from tests.hub.fake_hub import serving  # noqa: E402

BASE = "Qwen/Qwen2.5-0.5B"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub that huggingface_hub talks to, with a valid token."""
    from huggingface_hub import constants

    with serving() as (state, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, importlib.import_module("huggingface_hub.file_download")):  # below 1 it has a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", state.token)
        yield state


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> dict[str, Path]:
    """One product of each kind, and the checkpoints that they were made from."""
    folder = tmp_path_factory.mktemp("products")
    source = weights()
    base, run = save(folder / "base", source), save(folder / "step_1", trained(source))
    later = save(folder / "step_2", trained(source, seed=7))
    opdkernels.patch.create(base, run, folder / "step.patch")
    opdkernels.masks.changed(base, run).save(folder / "m.safetensors")
    analyze(base, run, folder / "analysis", csv=True)
    overlap(base, run, later, out=folder / "overlap")
    trajectory(base, run, later, out=folder / "trajectory")
    names = {"patch": "step.patch", "masks": "m.safetensors"}
    return {name: folder / names.get(name, name) for name in (*names, "base", "step_1", "analysis", "overlap",
                                                              "trajectory")}  # fmt: skip


def run_example(readme: bytes, **names) -> dict:
    """Executes the Python block of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", readme.decode(), re.DOTALL)
    namespace = dict(names)
    exec(code, namespace)
    return namespace


def test_a_patch_is_uploaded_with_a_card_that_works(hub, products, tmp_path, monkeypatch):
    result = push_to_hub(products["patch"], "me/patch", private=True)
    files = hub.files("me/patch")
    assert files["step.patch"] == products["patch"].read_bytes()
    assert result["files"] == ["step.patch", "README.md"]
    assert re.fullmatch(r"http://127.0.0.1:\d+/me/patch/commit/[0-9a-f]{40}", result["url"])
    assert (result["kind"], result["bytes"]) == ("patch", len(files["step.patch"]))
    assert hub.repos["models", "me/patch"].private
    assert [commit["summary"] for commit in hub.commits("me/patch")] == ["Upload step.patch with opdkernels"]
    info = opdkernels.patch.info(products["patch"])
    assert info["base_digest"] in files["README.md"].decode()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BASE").symlink_to(products["base"])
    run_example(files["README.md"])
    expected = (products["step_1"] / "model.safetensors").read_bytes()
    assert (tmp_path / "trained" / "model.safetensors").read_bytes() == expected


def test_the_card_has_metadata_of_the_base_model(hub, products):
    import yaml

    push_to_hub(products["patch"], "me/patch", base_model=BASE)
    text = hub.files("me/patch")["README.md"].decode()
    _, block, rest = text.split("---\n", 2)
    assert yaml.safe_load(block) == {
        "library_name": "opdkernels",
        "base_model": BASE,
        "tags": ["opdkernels", "sparse-patch"],
    }
    assert rest.startswith("\n# patch\n")
    assert f"(https://huggingface.co/{BASE})" in rest
    assert f'opdkernels.patch.apply("{BASE}", patch, "trained")' in rest


def test_masks_are_uploaded_with_a_card_that_works(hub, products):
    push_to_hub(products["masks"], "me/masks", base_model=BASE)
    masks = opdkernels.MaskSet.load(products["masks"])
    readme = hub.files("me/masks")["README.md"]
    assert masks.digest in readme.decode()
    assert f"{masks.num_active:,} of {masks.numel:,}" in readme.decode()
    model = torch.nn.Module()
    model.named_parameters = lambda **_: [(name, torch.nn.Parameter(tensor)) for name, tensor in weights().items()]
    namespace = run_example(readme, model=model)
    assert namespace["masks"] == masks


@pytest.mark.parametrize("kind", ["analysis", "overlap", "trajectory"])
def test_a_run_is_uploaded_without_caches_and_other_files(hub, products, tmp_path, kind):
    folder = tmp_path / "run"
    shutil.copytree(products[kind], folder)
    for name in ("README.md", "notes.txt", "tallies/mine.txt", "model.safetensors", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    push_to_hub(folder, "me/run")
    files = hub.files("me/run")
    assert not {"notes.txt", "tallies/mine.txt", "model.safetensors", ".git/config"} & files.keys()
    assert {"run.json", "summary.json", "report.html"} <= files.keys()
    assert not any(name.startswith("factors/") for name in files)
    assert files["README.md"] != b"mine"
    assert (folder / "README.md").read_text() == "mine"
    for name in files.keys() - {"README.md", ".gitattributes"}:
        assert files[name] == (products[kind] / name).read_bytes()
    result = run_example(files["README.md"])["result"]
    if kind == "analysis":
        assert result.summary == opdkernels.load(products[kind]).summary
        assert len(result.records) == len(opdkernels.load(products[kind]).records)
    else:
        assert result.num_rows > 0
    if kind == "trajectory":
        assert "steps/000001/tensors.parquet" in files


def test_a_card_has_no_absolute_path(hub, products):
    push_to_hub(products["analysis"], "me/run")
    text = hub.files("me/run")["README.md"].decode()
    assert str(products["base"].parent) not in text
    assert "| base | products0/base |" in text
    assert card.escape(opdkernels.load(products["analysis"]).summary["verdict"]["text"]) in text


def test_a_readme_of_the_user_keeps_its_text(hub, products):
    begin, end = card.markers(product_of(products["patch"]))
    push_to_hub(products["patch"], "me/patch")
    mine = "---\nlicense: mit\n---\n# Mine\n\nText with ünïcode.\n"
    hub.files("me/patch")["README.md"] = mine.encode()
    push_to_hub(products["patch"], "me/patch")
    first = hub.files("me/patch")["README.md"].decode()
    assert first.startswith(mine.rstrip() + f"\n\n{begin}\n")
    hub.files("me/patch")["README.md"] = first.replace("# Mine", "# Ours").encode() + b"\nAfter it.\n"
    push_to_hub(products["patch"], "me/patch", base_model=BASE)
    second = hub.files("me/patch")["README.md"].decode()
    assert second.count(begin) == second.count(end) == 1
    assert second.startswith(mine.replace("# Mine", "# Ours"))
    assert second.endswith(f"{end}\n\nAfter it.\n")
    assert BASE in second
    assert BASE not in first


def test_each_product_of_a_repository_has_its_section(hub, products):
    for name in ("patch", "masks", "analysis", "masks", "patch", "analysis"):
        push_to_hub(products[name], "me/all")
    text = hub.files("me/all")["README.md"].decode()
    for name in ("patch", "masks", "analysis"):
        assert [text.count(marker) for marker in card.markers(product_of(products[name]))] == [1, 1]
    assert text.count("```python") == 3
    assert text.count("library_name") == 1
    assert {"step.patch", "m.safetensors", "run.json"} <= hub.files("me/all").keys()


def test_a_readme_with_damaged_markers_is_not_touched(hub, products):
    begin, end = card.markers(product_of(products["patch"]))
    push_to_hub(products["patch"], "me/patch")
    for text in (f"# Mine\n{end}\n{begin}\n", f"{begin}\n{end}\n" * 2, f"{begin}\n"):
        hub.files("me/patch")["README.md"] = text.encode()
        with pytest.raises(InputError, match=r"README\.md of me/patch does not have the markers"):
            push_to_hub(products["patch"], "me/patch")
    hub.files("me/patch")["README.md"] = b"\xff\xfe"
    with pytest.raises(InputError, match="is not UTF-8"):
        push_to_hub(products["patch"], "me/patch")


def test_files_of_others_are_never_replaced(hub, products, tmp_path):
    from safetensors.torch import save as to_bytes

    push_to_hub(products["patch"], "me/model")
    files = hub.files("me/model")
    shutil.copy(products["masks"], tmp_path / "model.safetensors")
    for content in (to_bytes({"w": torch.ones(2)}), b"no safetensors", products["patch"].read_bytes()):
        files["model.safetensors"] = content
        with pytest.raises(InputError, match=r"me/model has a file model\.safetensors that is not of a file of masks"):
            push_to_hub(tmp_path / "model.safetensors", "me/model")
        assert files["model.safetensors"] == content
    files["model.safetensors"] = products["masks"].read_bytes()
    push_to_hub(tmp_path / "model.safetensors", "me/model")
    for name, content in (("summary.json", b"{}"), ("run.json", b'{"format": "mine"}')):
        hub.files("me/model")[name] = content
        with pytest.raises(InputError, match=rf"me/model has a file {name} that is not of a run of analyze"):
            push_to_hub(products["analysis"], "me/model")
        del hub.files("me/model")[name]


def test_a_second_upload_of_a_run_deletes_what_the_first_one_left(hub, products, tmp_path):
    push_to_hub(products["analysis"], "me/run")
    hub.files("me/run")["notes.txt"] = b"mine"
    source = weights()
    base, other = save(tmp_path / "base", source), save(tmp_path / "other", trained(source, seed=9))
    analyze(base, other, tmp_path / "out", spectra="off")
    result = push_to_hub(tmp_path / "out", "me/run", commit_message="Again")
    files = hub.files("me/run")
    assert {"tensors.csv", "geometry.parquet"} <= set(result["deleted"])
    assert files["notes.txt"] == b"mine"
    assert files.keys() - {"notes.txt", "README.md", ".gitattributes"} == product_of(tmp_path / "out").files.keys()
    assert hub.commits("me/run")[-1]["summary"] == "Again"
    assert run_example(files["README.md"])["result"].summary == opdkernels.load(tmp_path / "out").summary


def test_revision_pull_request_and_dataset(hub, products):
    push_to_hub(products["masks"], "me/masks")
    push_to_hub(products["patch"], "me/masks", revision="v2")
    assert "step.patch" in hub.files("me/masks", "v2")
    assert "step.patch" not in hub.files("me/masks")
    result = push_to_hub(products["patch"], "me/masks", create_pr=True)
    assert result["url"].endswith("/me/masks/discussions/3")
    assert "step.patch" in hub.files("me/masks", "refs/pr/3")
    assert "step.patch" not in hub.files("me/masks")
    push_to_hub(products["analysis"], "me/runs", repo_type="dataset")
    readme = hub.files("me/runs", type="datasets")["README.md"]
    assert b'snapshot_download("me/runs", repo_type="dataset")' in readme


def test_a_commit_of_another_user_in_between_is_not_lost(hub, products):
    push_to_hub(products["patch"], "me/patch")

    def commit(repo):
        repo.branches["main"]["README.md"] = b"# Theirs"

    hub.before_commit = commit
    with pytest.raises(InputError, match=r"cannot push to me/patch .*has changed in the meantime; push again"):
        push_to_hub(products["patch"], "me/patch")
    assert hub.files("me/patch")["README.md"] == b"# Theirs"


def assert_one_line(error) -> None:
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


def test_no_token(hub, products, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match=r"no access token.*run `hf auth login`, set HF_TOKEN, or give token"):
        push_to_hub(products["patch"], "me/patch")
    assert hub.requests == []
    push_to_hub(products["patch"], "me/patch", token="hf_valid")
    with pytest.raises(InputError, match=r"cannot push to me/patch \(.*\); log in with `hf auth login`") as error:
        push_to_hub(products["patch"], "me/patch", token="hf_wrong")
    assert_one_line(error)


def test_a_repository_that_may_not_be_written(hub, products):
    push_to_hub(products["patch"], "me/patch")
    hub.read_only.add("me/patch")
    with pytest.raises(InputError, match="give a token that may write to this repository, or open a pull") as error:
        push_to_hub(products["patch"], "me/patch")
    assert_one_line(error)
    assert push_to_hub(products["patch"], "me/patch", create_pr=True)["url"].endswith("discussions/2")
    with pytest.raises(InputError, match="rights to create a model under the namespace other") as error:
        push_to_hub(products["patch"], "other/new")
    assert_one_line(error)


def test_unreachable(hub, products, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match=r"cannot push to me/patch \(\w+: .*\); check the network") as error:
        push_to_hub(products["patch"], "me/patch")
    assert_one_line(error)


def test_offline_mode(hub, products, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reset_sessions = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)  # of versions below 1
    reset_sessions()
    with pytest.raises(InputError, match="cannot push to me/patch in offline mode; unset HF_HUB_OFFLINE"):
        push_to_hub(products["patch"], "me/patch")
    assert hub.requests == []
    reset_sessions()


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "me/has space", "-x/y", "me/a..b", None, 3])
def test_invalid_repository(products, repo_id):
    with pytest.raises(UsageError, match=r"repo_id is .*; give an id of the Hub, such as org/name"):
        push_to_hub(products["patch"], repo_id, token="t")


def test_options_that_do_not_fit(products):
    for options, message in (
        ({"base_model": "../x"}, r"base_model is '\.\./x'; give an id"),
        ({"create_pr": True, "revision": "v2"}, "leave out revision"),
        ({"repo_type": "space"}, "repo_type is 'space'; give model or dataset"),
    ):
        with pytest.raises(UsageError, match=message):
            push_to_hub(products["patch"], "me/patch", token="t", **options)


def test_paths_without_a_product(products, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    shutil.copytree(products["analysis"], tmp_path / "unfinished")
    run = json.loads((tmp_path / "unfinished" / "run.json").read_text())
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps(run | {"status": "running"}))
    shutil.copytree(products["analysis"], tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_text("{}")
    cut = products["patch"].read_bytes()[:-1]
    (tmp_path / "cut.patch").write_bytes(cut)
    for name, message in {
        "nowhere": "does not exist; give a patch",
        "notes.txt": "is neither a patch nor a file of masks",
        "empty": "holds no run",
        "unfinished": "holds a run that is running; run analyze again",
        "damaged": "summary.json is damaged",
        "cut.patch": "cut.patch",
    }.items():
        with pytest.raises(InputError, match=message):
            push_to_hub(tmp_path / name, "me/x", token="t")
    with pytest.raises(InputError, match="is neither a patch nor a file of masks"):
        push_to_hub(products["step_1"] / "model.safetensors", "me/x", token="t")


def test_without_the_library_the_message_names_the_extra(products, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install opdkernels\[hub\]"):
        push_to_hub(products["patch"], "me/patch")


def test_text_from_files_cannot_act_in_a_card(tmp_path):
    assert card.escape("a|b\n<img src=x>`c`") == r"a\|b \<img src=x\>\`c\`"


@pytest.mark.parametrize(("flags", "private"), [([], None), (["--private"], True)])
def test_without_the_flag_the_owner_decides_who_sees_a_new_repository(products, monkeypatch, flags, private):
    passed = {}
    result = {"url": "https://hub/me/masks", "files": ["README.md"], "deleted": [], "bytes": 1}
    monkeypatch.setattr("opdkernels.hub.push_to_hub", lambda *arguments, **options: passed.update(options) or result)
    assert run_cli("push", products["masks"], "me/masks", *flags).returncode == 0
    assert passed.get("private") is private


def test_the_command_prints_what_it_uploaded(hub, products):
    done = run_cli("push", products["masks"], "me/masks", "--private", "--base-model", BASE)
    assert (done.returncode, done.stderr) == (0, "")
    uploaded, url = done.stdout.splitlines()
    assert uploaded.startswith("uploaded m.safetensors, README.md (")
    assert "/me/masks/commit/" in url
    assert hub.repos["models", "me/masks"].private
    done = run_cli("push", products["masks"], "me/masks", "-q", "--json", "--commit-message", "Again")
    assert json.loads(done.stdout)["kind"] == "masks"
    assert hub.commits("me/masks")[-1]["summary"] == "Again"
    assert run_cli("push", products["masks"], "me/masks", "-q").stdout == ""
