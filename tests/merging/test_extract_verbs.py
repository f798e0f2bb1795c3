"""extract, convert and compress on the command line."""

import json

import peft

from adapters_kit import cli
from tests.support import shipping


def test_each_verb_writes_an_adapter_and_prints_its_error(capsys, tmp_path):
    base = shipping.save_base("llama", tmp_path / "base")
    dora = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    shipping.train_on(base, dora, tmp_path / "dora").merge_and_unload().save_pretrained(tmp_path / "tuned")
    orders = {
        "extract": [str(base), str(tmp_path / "tuned"), str(tmp_path / "extract"), "--rank", "64"],
        "convert": [str(tmp_path / "dora"), str(base), str(tmp_path / "convert"), "--rank", "64"],
        "compress": [str(tmp_path / "convert"), str(tmp_path / "compress"), "--energy", "0.9"],
    }
    for verb, words in orders.items():
        assert cli.main([verb, *words]) == 0
        assert "misses" in capsys.readouterr().out
        config = json.loads((tmp_path / verb / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and not config.get("use_dora")
    wanted = shipping.load(tmp_path / "tuned")
    for verb in ("extract", "convert"):
        made = peft.PeftModel.from_pretrained(shipping.load(base), tmp_path / verb).eval()
        assert shipping.gap(made, wanted) < 1e-4
