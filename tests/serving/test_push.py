"""What push() sends, told without a hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

import adapters_kit as ak
from adapters_kit.artifacts.leaks import find_leaks, scrub
from adapters_kit.serving import hub
from tests.support import small


@pytest.fixture
def sent(monkeypatch, tmp_path) -> Path:
    """The folder into which what is sent is copied."""
    taken = tmp_path / "sent"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, folder_path, **_):
            taken.mkdir()
            for path in Path(folder_path).iterdir():
                (taken / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub, "_need_hub", lambda: None)
    return taken


def test_no_path_of_this_machine_is_sent_and_nothing_here_changes(sent, tmp_path):
    folder = tmp_path / "adapter"
    ak.wrap(ak.load(small.model("llama")), "lora").save_pretrained(folder)
    (folder / "notes.md").write_text("rows came from /home/somebody/patients/rows.csv\n")
    (folder / "training_args.bin").write_bytes(b"x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert find_leaks(folder)
    hub.push(folder, "owner/name")
    assert not find_leaks(sent)
    assert not (sent / "training_args.bin").exists()
    assert (
        json.loads((sent / "adapter_config.json").read_text())["base_model_name_or_path"] == small.model("llama").name
    )
    assert (sent / "notes.md").read_text() == "rows came from rows.csv\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_links_rows_and_access_tokens_stay_here(sent, tmp_path):
    folder = tmp_path / "adapter"
    ak.wrap(ak.load(small.model("llama")), "lora").save_pretrained(folder)
    (tmp_path / "secret").write_text("private")
    (folder / "license.txt").symlink_to(tmp_path / "secret")
    (folder / "samples.jsonl").write_text('{"text": "a row"}\n')
    hub.push(folder, "owner/name")
    assert not {"license.txt", "samples.jsonl"} & {path.name for path in sent.iterdir()}
    (folder / "notes.md").write_text("HF_TOKEN=hf_" + "a1B2" * 8)
    with pytest.raises(ak.AdapterError, match=r"(?s)notes\.md:1 holds an access token.*Nothing was sent"):
        hub.push(folder, "owner/other")


def test_a_card_or_recipe_that_is_a_bomb_is_no_hindrance(sent, tmp_path):
    folder = tmp_path / "adapter"
    ak.wrap(ak.load(small.model("llama")), "lora").save_pretrained(folder)
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
    )
    (folder / "README.md").write_text(f"---\n{bomb}---\n# Mine\n")
    (folder / "recipe.yaml").write_text(bomb)
    hub.push(folder, "owner/name")
    assert "# Mine" in (sent / "README.md").read_text() and len((sent / "README.md").read_text()) < 10_000


TELLING = {
    "/home/alice/x.csv": "x.csv",
    "file:///home/alice/x.csv": "file://x.csv",
    "dir:/fsx/alice/x.csv": "dir:x.csv",
    "C:/Users/alice/x.csv": "x.csv",
    "C:\\Users\\al ice\\x.csv": "x.csv",
    "\\\\server\\share\\alice": "alice",
    "~/rows/x.csv": "x.csv",
    "~alice/x.csv": "x.csv",
}
PLAIN = [
    *(
        "https://example.org/home/alice",
        "and/or 1/2",
        "/v1/chat/completions",
        "about ~5/8 of",
        "\\frac{a}{b} \\\\times",
    ),
    *("\\alpha\\beta", "\\frac{a}{b} \\\\times", "layers.0/x", "//cdn.x/y/z", "a:b/c", '"\\\\alpha\\\\beta"'),
]


@pytest.mark.parametrize("path", TELLING)
def test_paths_of_every_system_are_cut(path):
    assert scrub(path) == TELLING[path]
    assert json.loads(scrub(json.dumps({"p": f"see {path}"}))) == {"p": f"see {TELLING[path]}"}


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_looks_like_a_path_stays(text):
    assert scrub(text) == text


def test_a_config_names_no_path_in_any_field(tmp_path):
    folder = tmp_path / "adapter"
    base = tmp_path / "home" / "base"
    shutil.copytree(small.model("llama"), base)
    init = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": str(base)}
    ak.wrap(ak.load(base), "prompt", num_virtual_tokens=4, **init).save_pretrained(folder)
    assert str(base) in (folder / "adapter_config.json").read_text()
    ak.export(folder, tmp_path / "out" / "exported", base=base)
    raw = json.loads((tmp_path / "out" / "exported" / "adapter_config.json").read_text())
    assert raw["tokenizer_name_or_path"] == "base"
