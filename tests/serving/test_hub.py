"""push() and pull() over HTTP, to and from a hub on this machine (tests/support/hub_server.py)."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import save_file

import adapters_kit as ak
from adapters_kit.artifacts import hub_ping
from adapters_kit.artifacts.staging import file_sha256
from adapters_kit.errors import ModelError, ShippingError
from tests.support import hub_server, small


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows us, in the place of the true one; its cache is empty, as on a new machine."""
    with hub_server.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the true hub's own protocol, beside plain LFS
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub_ping.reachable.cache_clear()
        yield server
        hub_ping.reachable.cache_clear()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A run of two steps in `run`, and what came of merging it in `merged`."""
    folder = tmp_path_factory.mktemp("shipped")
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "data": small.sentiment(40)}
    run = ak.train(recipe | {"method": "lora", "training": {"max_steps": 2}}, folder / "run")
    ak.merge(run, folder / "merged")
    return folder


def front(text: bytes) -> dict:
    return yaml.safe_load(text.decode().split("---\n")[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("which", ["run", "merged"])
def test_what_is_pushed_comes_back_byte_for_byte(hub, shipped, tmp_path, which):
    sent = ak.push(shipped / which, f"me/{which}", license="apache-2.0", private=True)
    files = hub.files(f"me/{which}")
    assert sent.files == sorted(files) and hub.private[f"me/{which}"] and sent.url == f"{hub.url}/me/{which}"
    back = contents(ak.pull(f"me/{which}", tmp_path / "back"))
    assert back == files
    here = contents(shipped / "run" / "adapter" if which == "run" else shipped / which)
    weights = [name for name in here if name.endswith(".safetensors")]
    assert weights and all(back[name] == here[name] for name in [*weights, "tokenizer.json"])
    assert any(method == "PUT" and path.startswith("lfs/") for method, path in hub.asked), "weights go through LFS"
    card, metrics = front(files["README.md"]), json.loads((shipped / "run" / "metrics.json").read_text())
    assert card["license"] == "apache-2.0" and card["pipeline_tag"] == "text-classification"
    _, results = model_index_to_eval_results(card["model-index"])
    scores = {one.metric_type: one.metric_value for one in results}
    assert scores["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-6) and "f1" in scores


def test_a_manifest_still_tells_the_hash_of_every_file(hub, shipped, tmp_path):
    ak.push(shipped / "merged", "me/merged", license="mit")
    back = ak.pull("me/merged", tmp_path / "back")
    files = json.loads((back / "manifest.json").read_text())["files"]
    assert "README.md" in files
    for name, told in files.items():
        assert told == {"bytes": (back / name).stat().st_size, "sha256": file_sha256(back / name)}, name


def test_a_pushed_folder_is_asked_by_its_hub_id(hub, shipped):
    ak.push(shipped / "run", "me/run")
    ak.push(shipped / "merged", "me/merged")
    rows = ["a fine film", "a dull plot"]
    here = ak.predict(shipped / "run", rows)
    assert ak.predict("me/run", rows, model=str(small.model("bert"))) == here
    there = ak.predict("me/merged", rows)
    assert [row["label"] for row in there] == [row["label"] for row in here]
    with pytest.raises(ModelError, match="nothing of that name is here, and the hub tells nothing of it"):
        ak.predict("me/nothing", rows)


def test_base_and_data_of_the_hub_are_named_and_those_of_this_machine_are_not(hub, shipped, tmp_path, monkeypatch):
    """`models/base` is a folder here though it looks like a hub id: the record that was written beside it knows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small.model("llama"), "models/base")
    ak.wrap(ak.load("models/base"), "lora").save_pretrained("one")
    monkeypatch.chdir(tmp_path.parent)
    ak.push(tmp_path / "one", "me/one")
    assert json.loads(hub.files("me/one")["adapter_config.json"])["base_model_name_or_path"] == "base"
    two = shutil.copytree(shipped / "run" / "adapter", tmp_path / "two")
    config = json.loads((two / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (two / "adapter_config.json").write_text(json.dumps(config))
    (two / "adapters_kit.json").unlink()
    recipe = yaml.safe_load((two / "recipe.yaml").read_text()) | {"model": "org/base", "data": {"train": "org/rows"}}
    (two / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (two / "README.md").write_text("# Mine\n")
    ak.push(two, "me/two")
    card = front(hub.files("me/two")["README.md"])
    assert (card["base_model"], card["datasets"]) == ("org/base", ["org/rows"])
    assert "datasets" not in front((shipped / "run" / "README.md").read_bytes())


def test_folders_of_a_model_go_along_and_what_stays_is_told(hub, shipped, tmp_path):
    folder = shutil.copytree(shipped / "merged", tmp_path / "model")
    for name in ("1_Pooling/config.json", "additional_chat_templates/tool.jinja", "checkpoint-4/optimizer.pt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    (folder / "samples.jsonl").write_text("{}\n")
    sent = ak.push(folder, "me/model")
    assert {"1_Pooling/config.json", "additional_chat_templates/tool.jinja"} <= set(hub.files("me/model"))
    assert sent.left == ["checkpoint-4", "samples.jsonl"] and "not sent: checkpoint-4, samples.jsonl" in str(sent)


def test_pushed_again_only_what_changed_is_sent(hub, shipped, tmp_path):
    folder = shutil.copytree(shipped / "run" / "adapter", tmp_path / "adapter")
    ak.push(folder, "me/again")
    hub.asked.clear()
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Another card\n")
    ak.push(folder, "me/again", license="apache-2.0")
    card = hub.files("me/again")["README.md"]
    assert not any(path.startswith("lfs/") for _, path in hub.asked)
    assert (front(card)["license"], front(card)["tags"]) == ("apache-2.0", ["mine"]) and b"# Another card" in card
    first, second = hub.commits["me/again"][-2:]
    assert {name for name in second[1] if second[1][name] != first[1].get(name)} == {"README.md"}


def test_a_revision_is_pulled(hub, shipped, tmp_path):
    ak.push(shipped / "merged", "me/merged")
    first = hub.commits["me/merged"][-1][0]
    ak.push(shipped / "merged", "me/merged", license="mit")
    old = ak.pull("me/merged", tmp_path / "old", revision=first)
    assert "license" not in front((old / "README.md").read_bytes())
    with pytest.raises(ShippingError, match="no branch, tag or commit 'v9'"):
        ak.pull("me/merged", tmp_path / "none", revision="v9")
    with pytest.raises(ShippingError, match=r"^.*old already holds something"):
        ak.pull("me/merged", tmp_path / "old")
    assert not (tmp_path / "none").exists()


REFUSED = {
    "unknown token": ("hf_nobody", "me/run", "no token was given, or the hub does not know it .hf auth login"),
    "no name": (hub_server.TOKEN, "run", "'run' is no hub id: it is OWNER/NAME"),
    "bad name": (hub_server.TOKEN, "me/a name", "(?s)'me/a name' is no hub id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_may_not_push_is_told_why(hub, shipped, case):
    token, repo, message = REFUSED[case]
    with pytest.raises(ShippingError, match=message):
        ak.push(shipped / "run", repo, token=token)
    assert not hub.commits


def test_a_card_that_the_hub_cannot_read_is_told_with_its_reason(hub, shipped, tmp_path):
    folder = shutil.copytree(shipped / "run" / "adapter", tmp_path / "adapter")
    (folder / "README.md").write_text("---\ndatasets: one\n---\n# Mine\n")
    with pytest.raises(ShippingError, match=r'did not take me/run: Invalid metadata.*"datasets" must be an array'):
        ak.push(folder, "me/run")


def test_a_hub_out_of_order_is_told_and_nothing_half_fetched_stays(hub, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    hub.broken.add("lfs/")
    with pytest.raises(ShippingError, match=r"did not take me/run: .*adapter_model\.safetensors.*503"):
        ak.push(shipped / "run", "me/run")
    hub.broken.clear()
    ak.push(shipped / "run", "me/run")
    hub.broken.add("lfs/")
    with pytest.raises(ShippingError, match=r"did not give me/run: .*503"):
        ak.pull("me/run", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir() if "back" in path.name] == []


def test_who_may_not_see_a_repository_is_told_that(hub, shipped, tmp_path, monkeypatch):
    ak.push(shipped / "run", "me/run", private=True)
    monkeypatch.delenv("HF_TOKEN")
    for repo in ("me/run", "me/none"):
        with pytest.raises(ShippingError, match=f"give {repo}: there is no such repository, or it is private"):
            ak.pull(repo, tmp_path / "back")


def test_a_large_text_comes_back_too(hub, tmp_path):
    """Files beyond what a commit may hold are sent as LFS files, whatever is in them."""
    folder = tmp_path / "adapter"
    ak.wrap(ak.load(small.model("llama")), "lora", r=2).save_pretrained(folder)
    (folder / "vocab.txt").write_text("word\n" * hub_server.LARGE)
    save_file({}, folder / "empty.safetensors")
    (folder / "empty.txt").write_text("")
    ak.push(folder, "me/large")
    back = ak.pull("me/large", tmp_path / "back")
    for name in ("vocab.txt", "empty.safetensors", "empty.txt"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
