"""What push() sends, told without a hub."""

import json
from pathlib import Path

import huggingface_hub
import pytest

import adapters_kit as ak
from adapters_kit.artifacts.leaks import find_leaks
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
