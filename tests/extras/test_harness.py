"""eval --harness: a task of a folder here, scored by lm-evaluation-harness on a model with its adapter."""

import json

import pytest

pytest.importorskip("lm_eval")

import torch

import adapters_kit as ak
from adapters_kit import cli
from adapters_kit.errors import DataError, UnknownNameError
from adapters_kit.inference.harness import harness
from tests.support import small

TASK = """task: who_lives_where
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}} {{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[answer, name]}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    data = small.write_jsonl(folder / "rows.jsonl", small.questions(12))
    file = folder / "who.yaml"
    file.write_text(TASK.format(data=data))
    return file


def test_a_run_is_scored_as_it_is(task, tmp_path, capsys):
    rows = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["context"]} for row in small.questions(24)])
    training = {"max_steps": 2, "samples": 0}
    recipe = ak.Recipe(
        model=str(small.model("llama")), task="causal-lm", data=str(rows), method="houlsby", training=training
    )
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    capsys.readouterr()
    assert cli.main(["eval", str(run.path), "--harness", str(task), "--limit", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = json.loads((run.path / "harness.json").read_text())
    assert told == {"limit": 5, "results": found} and 0 <= found["who_lives_where"]["acc"] <= 1
    # The same choice by hand, of the model with its adapter.
    model = ak.wrap(ak.load(recipe.model, "causal-lm"), str(run.adapter)).eval()
    tokens = ak.load_processor(recipe.model)
    right = 0
    for row in small.questions(12)[:5]:
        asked = tokens(f"{row['context']} {row['question']}")["input_ids"]
        sums = []
        for answer in (row["answer"], row["name"]):
            ids = torch.tensor([asked + tokens(answer)["input_ids"]])
            with torch.no_grad():
                log_p = model(ids).logits[0, len(asked) - 1].float().log_softmax(-1)
            sums.append(float(log_p[ids[0, len(asked)]]))
        right += sums[0] > sums[1]
    assert found["who_lives_where"]["acc"] == pytest.approx(right / 5)


def test_what_cannot_be_scored(task, tmp_path):
    folder = small.model("llama")
    with pytest.raises(UnknownNameError, match="arc_easy"):
        harness(folder, "arc_eazy")
    with pytest.raises(DataError, match=r"whom\.yaml.*who\.yaml"):
        harness(folder, task.parent / "whom.yaml")
    with pytest.raises(DataError, match="1 or more"):
        harness(folder, task, limit=0)
    missing = tmp_path / "missing.yaml"
    missing.write_text(TASK.format(data=tmp_path / "none.jsonl").replace("who_lives", "nobody_lives"))
    with pytest.raises(DataError, match="The data of nobody_lives_where cannot be had"):
        harness(folder, missing)
    with pytest.raises(DataError, match="models that write"):
        harness(small.model("bert", model_class="BertForSequenceClassification"), task)
