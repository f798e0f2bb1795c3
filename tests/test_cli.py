"""The command line: verbs, flags, mistakes, terminals and pipes. Whole runs are in journeys/."""

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.arguments import grouped_keys, make_parser
from adapters_kit.recipe import known_flags
from adapters_kit.verbs.display import print_table
from tests.support import small


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
    "verb": (["trian"], "there is no verb 'trian'. Did you mean train or train-many?"),
    "flag": (["merge", "a", "b", "--verfy", "off"], "unknown argument '--verfy'. Did you mean --verify"),
    "recipe flag": (["train", "--metod.r", "3"], "unknown argument '--metod.r'. Did you mean"),
    "recipe key": (["train", "{recipe}"], "there is no key 'epoch' in 'training'. Did you mean epochs"),
    "missing recipe": (["train", "nowhere.yaml"], "No file 'nowhere.yaml'"),
    "no task": (["train", "--model", "m", "--data", "d.csv"], "task: is missing; it is one of causal-lm, "),
    "data without a task": (["train", "{data}"], "is data, so say what to learn, --task causal-lm|"),
    "no data": (["train", "nowhere.csv"], "No file 'nowhere.csv'"),
    "texts and data": (["predict", "runs/x", "a", "--data", "b.csv"], "Give either texts or --input"),
    "a file as text": (["predict", "runs/x", "{data}"], "--input {data} --out"),
    "grid": (["compare", "r.yaml", "--grid", "a,b"], "'a,b' is no list of numbers"),
    "no run": (["predict", "runs/x/adapter", "a"], "There is no run, adapter or model at 'runs/x/adapter'"),
    "a folder of data to compare": (
        ["compare", "{folder}", "--methods", "full,lora"],
        "is data, so say what to learn",
    ),
    "data to compare, without a task": (["compare", "{data}"], "is data, so say what to learn, --task causal-lm|"),
    "rank": (["train", "{data}", "--rank", "8"], "Did you mean --method.r?"),
    "alpha": (["train", "{data}", "--lora-alpha", "8"], "Did you mean --method.lora_alpha?"),
    "lr": (["train", "{data}", "--lr", "8"], "Did you mean --training.learning_rate?"),
    "rank of help": (["train", "--help", "rank"], "Did you mean method.r?"),
    "key of help": (["train", "--help", "training.epoch"], "Did you mean training.epochs"),
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
def files(tmp_path):
    """Names for the words in braces."""
    (tmp_path / "wrong.yaml").write_text("model: m\ntask: text-classification\ndata: d.csv\ntraining:\n  epoch: 3\n")
    (tmp_path / "data.csv").write_text("text,label\na,b\n")
    return {"recipe": str(tmp_path / "wrong.yaml"), "data": str(tmp_path / "data.csv"), "folder": str(tmp_path)}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(case, capsys, files):
    words, message = MISTAKES[case]
    status, out, err = run(capsys, *(word.format(**files) for word in words))
    assert status == 2 and not out
    assert message.format(**files) in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["train", "--help", "training.epochs"], ["train", "--help", "r"],
     ["merge", "a", "b", "--verfy"],
     ["train", "{recipe}"], ["train", "{data}"], ["trian"], ["--version"]],
)  # fmt: skip
def test_help_and_mistakes_do_not_import_torch(words, files):
    words = [word.format(**files) for word in words]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], check=True, capture_output=True, timeout=60)


def test_every_key_of_a_recipe_is_named_by_the_help_and_explained_when_asked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, "train", "--help")
    grouped = [key for keys in grouped_keys().values() for key in keys]
    sections = {"data", "method", "training", "version"}
    assert sorted(grouped) == sorted(set(known_flags()) - sections)
    assert all(f"--{key}" in out.split() for key in grouped) and len(out.splitlines()) < 60
    for key, text in known_flags().items():
        _, out, _ = run(capsys, "train", "--help", key)
        assert f"--{key}\n" in out and " ".join(text.split()) in " ".join(out.split())
    _, out, _ = run(capsys, "train", "--help", "all")
    assert all(f"--{key}\n" in out for key in known_flags())


@pytest.mark.parametrize(
    ("word", "config"),
    [("r", "LoraConfig"), ("method.r", "LoraConfig"), ("--method.bottleneck_dim", "BottleneckConfig"),
     ("num_virtual_tokens", "PromptLearningConfig"), ("epochs", "Passes"), ("learning_rate", "Peak")],
)  # fmt: skip
def test_help_explains_short_keys_and_the_options_of_methods(word, config, capsys):
    status, out, _ = run(capsys, "train", "--help", word)
    assert status == 0 and config in out and f".{word.rpartition('.')[2]}\n" in out


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


def test_a_data_file_and_flags_are_a_recipe(capsys, files):
    words = ["train", files["data"], "--task", "text-classification", "--model", "m", "--print-recipe", "--json"]
    status, out, _ = run(capsys, *words)
    assert status == 0 and json.loads(out)["data"]["train"] == files["data"]


def test_methods_lists_every_method(capsys, monkeypatch):
    from adapters_kit import registry

    monkeypatch.setenv("COLUMNS", "400")
    _, out, _ = run(capsys, "methods")
    listed = {line.split()[0] for line in out.splitlines()[1:] if not line.startswith(" ")}  # a cell may go on below
    assert set(registry.names()) <= listed and {"loha", "boft"} <= listed
    _, out, _ = run(capsys, "methods", "--json")
    assert {row["name"] for row in json.loads(out)} == listed


def test_narrow_terminals_cut_no_name(capsys, monkeypatch):
    from adapters_kit import registry

    for columns in ("20", "40", "70"):
        monkeypatch.setenv("COLUMNS", columns)
        _, out, _ = run(capsys, "methods")
        assert set(registry.names()) <= {line.split()[0] for line in out.splitlines() if line.strip()}


def test_output_that_is_not_unicode_gets_what_it_can_show(monkeypatch):
    for encoding in ("cp1252", "ascii"):
        shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", shown)
        assert cli.main(["inspect", str(small.model("bert")), "--methods", "lora"]) == 0
        shown.flush()
        assert b"BertForSequenceClassification" in shown.buffer.getvalue() and b"64 -> 64" in shown.buffer.getvalue()


def test_no_colour_where_none_is_wanted(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for words in (["methods"], ["inspect", str(small.model("bert")), "--methods", "lora"]):
        assert "\x1b[3" not in run(capsys, *words)[1]


@pytest.mark.slow
def test_whoever_reads_only_the_beginning_gets_no_complaint():
    command = f"{sys.executable} -m adapters_kit methods | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" not in done.stderr and len(done.stdout.splitlines()) == 1


def test_version_by_every_way_in(capsys):
    import adapters_kit

    expected = f"adapters-kit {adapters_kit.__version__}\n"
    assert run(capsys, "--version") == (0, expected, "")
    done = subprocess.run([sys.executable, "-m", "adapters_kit", "--version"], capture_output=True, text=True)
    assert done.stdout == expected


def test_what_breaks_is_one_sentence_with_the_trace_in_a_file(capsys, monkeypatch):
    def broken(options):
        raise RuntimeError("the disk melted\nand more")

    monkeypatch.setattr("adapters_kit.verbs.models.methods.__code__", broken.__code__)
    status, _, err = run(capsys, "methods")
    assert status == 1 and "methods broke: RuntimeError: the disk melted\n" in err and "Traceback" not in err
    trace = Path(err.partition("trace is in ")[2].partition(": please")[0])
    assert "the disk melted" in trace.read_text() and "Traceback" in trace.read_text()
    trace.unlink()


PYTHON_TO_FLAGS = {
    "resume=True goes on, overwrite=True starts anew.": "--resume goes on, --overwrite starts anew.",
    "say which task it is for, task=TASK. There are: a.": "say which task it is for, --task TASK. There are: a.",
    "or give api_key=SECRET too": "or give --api-key SECRET too",
    "verify='off' compares nothing": "--verify off compares nothing",
    "ak.wrap(ak.load('folder', task=...), 'lora')": "ak.wrap(ak.load('folder', task=...), 'lora')",
    "other=True stays": "other=True stays",
}


@pytest.mark.parametrize("message", PYTHON_TO_FLAGS)
def test_messages_name_flags_where_flags_were_typed(message):
    names = ["--resume", "--overwrite", "--task", "--api-key", "--verify"]
    assert cli.as_flags(message, names) == PYTHON_TO_FLAGS[message]


def test_a_finished_run_is_not_overwritten_and_the_flag_is_named(capsys, tmp_path):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(16))
    words = ["train", str(rows), "--task", "text-classification", "--model", str(small.model("bert")),
             "--training.max_steps", "1", "--out", str(tmp_path / "run")]  # fmt: skip
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0 and json.loads(out)["metrics"]["steps"] == 1
    status, _, err = run(capsys, *words)
    assert status == 2 and "--overwrite" in err and "overwrite=True" not in err


def test_completion_knows_verbs_flags_and_keys(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        status, out, _ = run(capsys, "completion", shell)
        assert status == 0 and all(word in out for word in ("predict", "--max-lora-rank", "--training.learning_rate"))


def test_doctor_tells_versions_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0 and "torch" in found["versions"]
    assert all(one["works"] or one["try"].startswith("pip install") for one in found["features"].values())
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and "pip install" in out


def test_every_verb_prints_json_where_it_has_a_result(capsys):
    _, known = make_parser()
    without = {name for name, verb in known.items() if "--json" not in verb.format_usage()}
    assert without == {"chat", "serve", "ui", "completion"}


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
    status, out, _ = run(capsys, "check", str(canonical), "--target", "vllm", "--max-lora-rank", "1", "--json")
    assert status == 1 and "max_lora_rank" in json.loads(out)["problems"][0]["what"]


@pytest.mark.slow
def test_a_plan_for_a_length_needs_no_data(capsys):
    words = ["--model", str(small.model("llama")), "--task", "causal-lm", "--length", "16", "--gpu", "8GB"]
    status, out, err = run(capsys, "plan", *words)
    assert status == 0 and "fits" in out, err


def test_what_we_warn_of_is_a_sentence_and_others_warnings_stay_as_they_are():
    usual = warnings.formatwarning
    theirs = ("old", FutureWarning, "theirs.py", 3)
    with cli._plain_warnings():
        assert (
            warnings.formatwarning("4 rows are set aside.", UserWarning, cli.__file__, 3) == "4 rows are set aside.\n"
        )
        assert warnings.formatwarning(*theirs) == usual(*theirs)
    assert warnings.formatwarning is usual


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_is_never_wider_than_the_terminal_and_nothing_of_it_is_cut(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["what", "it is", "why not"]
    rows = [["4 and 8 bit weights (quantize)", "missing", "pip install one-long-word-of-it"], ["b", "works", ""]]
    print_table(names, rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(width, 31)  # a word that is longer than the terminal stays whole
    assert not re.search(r" $", out, re.MULTILINE)
    assert "…" not in out and all(word in out for row in rows for cell in row for word in cell.split())
