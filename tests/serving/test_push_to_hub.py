"""`push_to_hub` of a model that went through `ak.load` or `ak.wrap` sends the record of its base."""

import json
from pathlib import Path
from types import SimpleNamespace

import peft
import transformers

import adapters_kit as ak
from adapters_kit.artifacts.record_reader import RECORD
from tests.support import small


def test_the_record_travels_with_what_is_pushed(monkeypatch, tmp_path):
    sent = {}

    def upload(self, folder, repo_id, *_, **__):
        sent.update({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
        return SimpleNamespace(repo_id=repo_id)

    hub = transformers.utils.hub
    monkeypatch.setattr(
        hub, "hf_api", lambda: SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda _: None))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    base = ak.load(small.model("llama"))
    for model in (ak.wrap(base, "lora", r=2), peft.get_peft_model(ak.load(small.model("llama")), peft.LoraConfig(r=2))):
        sent.clear()
        model.push_to_hub("owner/name")
        record = json.loads(sent[RECORD])
        assert "adapter_model.safetensors" in sent and record["base"] == small.model("llama").name
        assert len(record["tensors"]) > 10 and record["quantize"] is None
