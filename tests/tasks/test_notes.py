"""What was done to the rows is said once, counted once, and reaches metrics.json and the card."""

import json

import adapters_kit as ak
from adapters_kit.tasks.causal_lm import CausalLM
from adapters_kit.tasks.notes import Notes
from tests.support import small


def test_a_sentence_is_said_and_counted_once():
    notes = Notes()
    with notes.about("training data"):
        notes.say("2 rows were left out.", rows_left_out=2)
        notes.say("2 rows were left out.", rows_left_out=2)
    with notes.about("held-out data"):
        notes.say("2 rows were left out.", rows_left_out=2)
    assert notes.counts == {"rows_left_out": 4}
    assert notes.fresh() == ["training data: 2 rows were left out.", "held-out data: 2 rows were left out."]
    assert notes.fresh() == []


def test_notes_reach_screen_metrics_and_card(tmp_path, monkeypatch, capfd):
    encode = CausalLM.encode

    def telling(self, data, *, answers=True):
        if answers:
            self.notes.say(f"{len(data)} rows were looked at.", rows_seen=len(data))
        return encode(self, data, answers=answers)

    monkeypatch.setattr(CausalLM, "encode", telling)
    rows = small.write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in small.sentiment(20)])
    recipe = ak.Recipe(
        model=str(small.model("gpt2")),
        task="causal-lm",
        data=str(rows),
        max_new_tokens=8,
        training={"max_steps": 1, "samples": 0},
    )
    run = ak.train(recipe, tmp_path / "run")
    said = "training data: 18 rows were looked at."
    assert said in capfd.readouterr().err
    written = json.loads((run.path / "metrics.json").read_text())
    assert written["notes"][-2:] == [said, "held-out data: 2 rows were looked at."]
    assert written["counts"] == {"rows_seen": 20}
    assert f"- {said}" in (run.path / "README.md").read_text()
