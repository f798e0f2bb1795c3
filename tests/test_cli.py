"""The command line: verbs, flags, mistakes. Whole runs are in test_journey.py."""

import subprocess
import sys
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit import cli


def run(capsys, *words):
    """`(exit status, stdout, stderr)` of `adapters-kit words`."""
    try:
        status = cli.main(list(words))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert (status, out) == (0, f"adapters-kit {ak.__version__}\n")


MISTAKES = {
    "verb": (["trian"], "there is no verb 'trian'. Did you mean train?"),
    "flag": (["merge", "a", "b", "--verfy", "off"], "unknown argument '--verfy'. Did you mean --verify"),
    "recipe flag": (["train", "--metod.r", "3"], "unknown argument '--metod.r'. Did you mean"),
    "recipe key": (["train", "{recipe}"], "there is no key 'epoch' in 'training'. Did you mean epochs"),
    "missing recipe": (["train", "nowhere.yaml"], "No file 'nowhere.yaml'"),
    "texts and data": (["predict", "runs/x", "a", "--data", "b.csv"], "Give either texts or --data"),
}

WITHOUT_TORCH = """
import sys
from adapters_kit import cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
assert "torch" not in sys.modules, "torch was imported"
"""


@pytest.fixture
def wrong_recipe(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("model: m\ntask: text-classification\ndata: d.csv\ntraining:\n  epoch: 3\n")
    return str(path)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(case, capsys, wrong_recipe):
    words, message = MISTAKES[case]
    status, out, err = run(capsys, *(word.replace("{recipe}", wrong_recipe) for word in words))
    assert status == 2 and not out
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["merge", "a", "b", "--verfy"], ["train", "{recipe}"], ["trian"]]
)
def test_help_and_mistakes_do_not_import_torch(words, wrong_recipe):
    words = [word.replace("{recipe}", wrong_recipe) for word in words]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], check=True, capture_output=True, timeout=60)


def test_every_recipe_key_is_in_the_help_of_train(capsys):
    from adapters_kit.recipe import known_flags

    _, out, _ = run(capsys, "train", "--help")
    assert all(f"--{key}\n" in out and " ".join(text.split()) in out for key, text in known_flags().items())


def test_flags_change_the_recipe_wherever_they_stand(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ntask: text-classification\ndata: d.csv\nmethod: lora\n")
    words = [
        "train",
        "--method.r",
        "4",
        str(recipe),
        "--training.packing=false",
        "--print-recipe",
        "--training.epochs",
        "5",
    ]
    status, out, _ = run(capsys, *words)
    assert status == 0 and "r: 4" in out and "epochs: 5" in out


def test_methods_lists_every_method(capsys):
    from adapters_kit import registry

    _, out, _ = run(capsys, "methods")
    listed = {line.split()[0] for line in out.splitlines()[1:]}
    assert set(registry.names()) <= listed and {"loha", "boft"} <= listed


def test_an_adapterhub_adapter_is_converted_checked_and_exported(capsys, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fixtures = Path(__file__).parent / "fixtures" / "adapterhub" / "llama"
    adapter, canonical = tmp_path / "adapter", tmp_path / "canonical"
    assert run(capsys, "convert", str(fixtures / "lora"), str(fixtures / "base"), str(adapter))[0] == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fixtures / "base"), adapter)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    status, out, _ = run(capsys, "check", str(adapter), "--target", "peft")
    assert status == 0 and "loads in peft" in out
    status, out, _ = run(capsys, "export", str(adapter), str(canonical), "--canonical")
    assert status == 0 and "alpha = r" in out and (canonical / "adapter_model.safetensors").is_file()
    status, out, _ = run(capsys, "check", str(canonical), "--target", "vllm", "--max-lora-rank", "1")
    assert status == 1 and "max_lora_rank" in out
