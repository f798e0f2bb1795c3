"""Every task: an example recipe of examples/recipes runs on tiny data and learns; encodings and scores are right."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.errors import DataError, ModelError
from adapters_kit.loading import load_processor
from adapters_kit.recipe import Recipe
from adapters_kit.task_table import TASKS
from adapters_kit.tasks import metrics, packing
from adapters_kit.tasks.base import IGNORED
from adapters_kit.tasks.seq2seq import text_scores
from adapters_kit.tasks.text_scores import plain, word_f1
from adapters_kit.tasks.token_classification import spans
from tests.support import shapes, small, sounds, tiny

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
FAST = {"training.epochs": 4.0, "training.max_steps": None, "training.batch_size": 8, "training.max_length": 48}


def causal(kind: str, count: int, seed: int = 0) -> list[dict]:
    made = []
    for row in small.questions(count, seed):
        question, answer = f"{row['context']} {row['question']}", row["answer"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append({"messages": turns} if kind == "messages" else {"prompt": question, "completion": answer})
    return made


def pictures(folder: Path, count: int) -> list[dict]:
    folder.mkdir()
    made = []
    for index in range(count):
        red = index % 2 == 0
        pixels = np.random.default_rng(index).integers(0, 80, (20, 24, 3), dtype=np.uint8)
        pixels[..., 0 if red else 2] += 170
        Image.fromarray(pixels).save(folder / f"{index}.png")
        made.append({"image": str(folder / f"{index}.png"), "label": "red" if red else "blue"})
    return made


def rows_for(example: str, tmp_path: Path) -> list[dict]:
    questions = small.questions(160)
    return {
        "text_classification": lambda: small.sentiment(160),
        "text_pairs": lambda: [
            {"sentence1": a["context"], "sentence2": b["context"], "label": str(int(a["answer"] == b["answer"]))}
            for a, b in zip(questions, small.questions(160, seed=1), strict=True)
        ],
        "multi_label": lambda: [
            {"text": r["context"], "labels": [r["name"], r["answer"]] if i % 3 else [r["name"]]}
            for i, r in enumerate(questions)
        ],
        "regression": lambda: [
            {"text": r["text"], "score": 1.5 if r["label"] == "good" else -1.5} for r in small.sentiment(320)
        ],
        "token_classification": lambda: [
            {
                "tokens": r["words"],
                "ner_tags": [
                    "B-PER" if w in small.NAMES else "B-LOC" if w in small.PLACES else "O" for w in r["words"]
                ],
            }
            for r in questions
        ],
        "question_answering": lambda: [
            {"question": r["question"], "context": r["context"], "answers": r["answer"]} for r in questions
        ],
        "translation": lambda: [{"source": r["context"], "target": r["name"]} for r in questions],
        "domain_adaptation": lambda: [{"text": r["context"]} for r in questions],
        "image_classification": lambda: pictures(tmp_path / "pictures", 48),
        "object_detection": lambda: shapes.boxes(48, tmp_path / "shapes"),
        "audio_classification": lambda: sounds.tones(48, tmp_path / "tones"),
        "speech_recognition": lambda: sounds.melodies(32, tmp_path / "melodies"),
        "reranking": lambda: small.judgements(40),
        "next_sentence": lambda: small.stories(80),
        "permutation_lm": lambda: [{"text": r["context"]} for r in questions],
        "bottleneck": lambda: small.sentiment(160),
        "lora_and_prefix": lambda: small.sentiment(160),
        "mix_and_match": lambda: small.sentiment(320),
        "unipelt": lambda: small.sentiment(160),
        "instruct": lambda: causal("prompt", 160),
        "prefix": lambda: causal("prompt", 160),
        "qlora": lambda: causal("prompt", 160),
        "chat": lambda: causal("messages", 160),
        "language_model": lambda: [{"text": r["context"]} for r in questions],
        "gguf": lambda: causal("prompt", 160),
        "distill": lambda: causal("messages", 40),
        **dict.fromkeys(("dpo", "orpo", "kto", "reward"), lambda: small.preferences(40)),
    }[example]()


MODELS = {
    "text_classification": ["distilbert", "xlnet"],
    "text_pairs": ["bert"],
    "multi_label": ["bert"],
    "regression": ["roberta"],
    "token_classification": ["bert:BertForTokenClassification"],
    "question_answering": ["bert:BertForQuestionAnswering"],
    "translation": ["t5", "bart"],
    "domain_adaptation": ["bert:BertForMaskedLM"],
    "image_classification": ["vit"],
    "object_detection": ["detr"],
    "audio_classification": ["wav2vec2"],
    "speech_recognition": ["whisper"],
    "reranking": ["bert"],
    "next_sentence": ["bert:BertForNextSentencePrediction"],
    "permutation_lm": ["xlnet:XLNetLMHeadModel"],
    "instruct": ["gpt2"],
    "chat": ["qwen3"],
    "language_model": ["gpt2"],
    "bottleneck": ["bert"],
    "lora_and_prefix": ["modernbert"],
    "mix_and_match": ["bert"],
    "unipelt": ["bert"],
    "prefix": ["llama"],
    "qlora": ["llama"],
    "gguf": ["llama"],
    "distill": ["llama"],
    **{key: ["llama"] for key in ("dpo", "orpo", "kto", "reward")},
}
ELSEWHERE = ("keep", "mix", "init", "search", "judge", "augment")  # tests of these keys train them
IN_EXTRAS = ("sentence_embedding",)  # tests/extras runs them
# A handful of trained units beside a tiny random model move it slowly.
PATIENCE = {
    "object_detection": {
        "training.keep_best": False,
        "training.learning_rate": 2e-3,
        "training.head_learning_rate": 2e-3,
        "data.box_format": "xywh",
    }
    | {"training.max_length": None},
    "audio_classification": {"training.head_learning_rate": 3e-3, "training.max_length": None},
    "speech_recognition": {"training.learning_rate": 1e-2, "training.max_length": None, "data.language": "en"},
    "bottleneck": {"training.epochs": 10.0, "training.learning_rate": 2e-2},
    "mix_and_match": {"training.epochs": 8.0, "training.learning_rate": 1e-3},
    "prefix": {"training.epochs": 10.0, "training.learning_rate": 2e-2},
}


def test_every_example_recipe_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*MODELS, *IN_EXTRAS, *ELSEWHERE}
    assert {Recipe.read(path).task for path in EXAMPLES.glob("*.yaml")} == set(TASKS)


CASES = [(example, name) for example, names in MODELS.items() for name in names]
# The pictures are those of the task: its first example draws them.
DRAWN = {Recipe.read(EXAMPLES / f"{example}.yaml").task: (example, name) for example, name in reversed(CASES)}.values()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "family"), [pytest.param(*pair, marks=pytest.mark.pictures if pair in DRAWN else ()) for pair in CASES]
)
def test_example_recipes_run_and_lower_the_loss(example, family, tmp_path):
    name, _, model_class = family.partition(":")
    if name in sounds.KINDS:
        pytest.importorskip("soundfile", reason="sound files need soundfile: pip install 'adapters-kit[audio]'")
        folder = sounds.speaker(name) if example == "speech_recognition" else sounds.model(name)
    elif name in shapes.DETECTORS:
        pytest.importorskip("pycocotools", reason="boxes need pycocotools: pip install 'adapters-kit[vision]'")
        folder = shapes.detector(name)
    elif example == "gguf":
        pytest.importorskip("gguf", reason="GGUF files need gguf: pip install 'adapters-kit[gguf]'")
        from tests.support import gguf_files

        folder = tmp_path / "base.gguf"
        gguf_files.write(name, folder, "Q4_1")
    else:
        folder = small.model(name, model_class=model_class or None, chat=example in ("chat", "distill"))
    path = small.write_jsonl(tmp_path / "rows.jsonl", rows_for(example, tmp_path))
    changes = FAST | {"training.learning_rate": 3e-3, "max_new_tokens": 4} | PATIENCE.get(example, {})
    recipe = Recipe.read(EXAMPLES / f"{example}.yaml").changed(model=str(folder), data={"train": str(path)}, **changes)
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    assert run.metrics["loss"] < 0.98 * run.metrics["base_loss"]
    again = ak.evaluate(run.path)
    assert again["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    answers = ak.predict(run.path, [Dataset.from_json(str(path))[i] for i in range(3)])
    assert len(answers) == 3
    assert all(answer for answer in answers)


def bound(name: str, data: list[dict], columns: dict, folder: Path, **recipe) -> tuple[tasks.Task, Dataset]:
    made = tasks.get(name)(Recipe(**{"model": str(folder), "task": name, "data": "x", **recipe}), columns)
    rows = Dataset.from_list(data)
    made.fit(rows, None)
    labels = {"labels": made.labels} if made.labels else {}
    made.bind(load_processor(folder), ak.load(folder, name, **labels))
    return made, rows


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_only_the_answer_counts(kind):
    folder = small.model("llama", chat=kind == "messages")
    columns = {"messages": "messages"} if kind == "messages" else {"prompt": "prompt", "completion": "completion"}
    task, rows = bound("causal-lm", causal(kind, 8), columns, folder)
    for feature, row in zip(task.encode(rows), small.questions(8), strict=True):
        kept = feature["labels"] != IGNORED
        assert task.processor.decode(feature["labels"][kept]) == f"{row['answer']} [EOS]"
        assert (feature["labels"][kept] == feature["input_ids"][kept]).all()
    everything, rows = bound("causal-lm", causal(kind, 8), columns, folder, answer_only=False)
    assert all((feature["labels"] != IGNORED).all() for feature in everything.encode(rows))


def test_a_long_prompt_loses_its_beginning_not_its_answer():
    data = [{"prompt": " ".join(["very"] * 50), "completion": "rome"}]
    columns = {"prompt": "prompt", "completion": "completion"}
    task, rows = bound("causal-lm", data, columns, small.model("llama"), training={"max_length": 8})
    (feature,) = task.encode(rows)
    assert len(feature["input_ids"]) == 8
    assert task.processor.decode(feature["labels"][feature["labels"] != IGNORED]) == "rome [EOS]"


def test_long_text_is_cut_into_pieces_that_lose_nothing():
    text = " ".join(["one two three four five"] * 9)
    task, rows = bound(
        "causal-lm", [{"text": text}], {"text": "text"}, small.model("gpt2"), training={"max_length": 16}
    )
    pieces = task.encode(rows)
    assert all(len(piece["input_ids"]) <= 16 for piece in pieces)
    assert task.processor.decode(np.concatenate([p["input_ids"] for p in pieces])) == f"{text} [EOS]"


PACKS = ["gpt2", "llama", "mistral", "qwen3", "gemma3"]


@pytest.mark.parametrize("family", PACKS)
def test_packed_logits_equal_unpacked(family):
    """Block-diagonal by position_ids: an example's logits do not change by sharing its row."""
    model = tiny.build(family).double()
    draw = np.random.default_rng(0)
    features = [
        {"row": i, "input_ids": draw.integers(5, tiny.VOCAB, n), "labels": draw.integers(5, tiny.VOCAB, n)}
        for i, n in enumerate([7, 3, 1, 9, 4])
    ]
    batch = packing.collate(packing.pack(features, 12), 0)
    assert batch["input_ids"].shape == (2, 12)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    seen = 0
    for ids, positions, row in zip(batch["input_ids"], batch["position_ids"], logits, strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for begin, end in pairwise(starts):
            with torch.no_grad():
                alone = model(input_ids=ids[None, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(row[begin:end], alone, rtol=1e-9, atol=1e-9)
            seen += end - begin
    assert seen == 24


@pytest.mark.slow
def test_packing_trains_as_without(tmp_path):
    """One step on everything at once: the same loss, packed or not."""
    path = small.write_jsonl(tmp_path / "rows.jsonl", causal("prompt", 24))
    training = {"max_steps": 2, "batch_size": 64, "log_every": 1, "max_length": 64, "warmup": 0.0}
    fields = {"model": str(small.model("llama")), "task": "causal-lm", "data": str(path)}
    fields["method"] = {"name": "lora", "r": 4}
    plain_run = ak.train(Recipe(**fields, training=training), tmp_path / "a", quiet=True)
    packed_run = ak.train(Recipe(**fields, training={**training, "packing": True}), tmp_path / "b", quiet=True)

    def losses(run: ak.Run) -> list[float]:
        return [line["loss"] for line in run.history() if "loss" in line]

    assert losses(packed_run) == pytest.approx(losses(plain_run), rel=1e-5)
    assert losses(packed_run)[1] < losses(packed_run)[0]


def test_a_model_that_mixes_packed_examples_is_refused():
    with pytest.raises(ModelError, match=r"does not keep packed examples apart.*packing off"):
        packing.check(tiny.build("bloom"), "bloom")
    packing.check(tiny.build("llama"), "llama")


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=200))
def test_bins_hold_everything_once_and_never_too_much(lengths):
    bins = list(packing.best_fit(lengths, 32))
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert max(loads) <= 32
    assert len(bins) <= 1 + 1.25 * sum(lengths) / 32 or sum(loads) > len(bins) * 16


def test_windows_find_an_answer_that_is_far_in():
    data = [{"q": "where does anna live ?", "c": " ".join(["very"] * 100) + " anna lives in oslo .", "a": "oslo"}]
    columns = {"question": "q", "context": "c", "answers": "a"}
    folder = small.model("bert", model_class="BertForQuestionAnswering")
    task, rows = bound("question-answering", data, columns, folder, training={"max_length": 32})
    features = task.encode(rows)
    held = [f for f in features if f["span"] != (0, 0)]
    assert len(features) > 4
    assert held
    for feature in held:
        first, last = feature["span"]
        assert task.processor.decode(feature["input_ids"][first : last + 1]) == "oslo"


@pytest.mark.parametrize(
    ("guess", "truth", "f1"), [("The rome!", "rome", 1.0), ("in rome", "rome italy", 0.5), ("", "rome", 0.0)]
)
def test_answers_compare_as_in_squad(guess, truth, f1):
    assert word_f1(guess, truth) == f1
    assert (plain(guess) == plain(truth)) == (f1 == 1)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "message"),
    [
        ("token-classification", {"t": ["a", "b"], "g": ["O"]}, {"tokens": "t", "tags": "g"}, "lists of equal length"),
        (
            "question-answering",
            {"q": "x", "c": "anna", "a": "rome"},
            {"question": "q", "context": "c", "answers": "a"},
            "'rome' does not stand in the context",
        ),
        ("causal-lm", {"m": [{"who": "me"}]}, {"messages": "m"}, "turn 1: no role in {'who': 'me'}"),
        ("image-classification", {"i": "nowhere.png", "l": "a"}, {"image": "i", "label": "l"}, "one class only"),
    ],
)
def test_rows_that_do_not_fit_the_task(name, rows, columns, message):
    task = tasks.get(name)(Recipe(model="m", task=name, data="x"), columns)
    with pytest.raises(DataError, match=message):
        task.fit(Dataset.from_list([rows, rows]), None)


def test_scores_of_a_classifier_by_hand():
    """Three classes, six examples; counts written out."""
    labels, guesses = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    probabilities = np.full((6, 3), 0.2)
    probabilities[np.arange(6), guesses] = 0.6
    found = metrics.classification(probabilities, labels)
    # class 0: 2 right of 3 guessed and 3 true; class 1: 1 of 3 guessed, 2 true; class 2: never guessed
    f1 = [2 / 3, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), 0]
    assert found["accuracy"] == found["f1_micro"] == pytest.approx(3 / 6)
    assert found["precision"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert found["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["f1"] == pytest.approx(sum(f1) / 3)
    assert found["loss"] == pytest.approx(-(3 * np.log(0.6) + 3 * np.log(0.2)) / 6)
    # Matthews: (c s - sum p t) / sqrt((s² - sum p²)(s² - sum t²)), c right of s, guessed p and true t of each class
    right, p, t = 3, np.array([3, 3, 0]), np.array([3, 2, 1])
    expected = (right * 6 - p @ t) / np.sqrt((36 - p @ p) * (36 - t @ t))
    assert found["mcc"] == pytest.approx(expected)
    assert metrics.confusion(guesses, labels, 3) == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_scores_of_several_labels_and_of_numbers():
    truth = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
    found = metrics.multi_label(np.array([[0.9, 0.1], [0.9, 0.2], [0.8, 0.7], [0.1, 0.1]]), truth)
    assert found["accuracy"] == 0.5, "all labels of an example right"
    assert found["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["f1"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 / (2 + 1)) / 2)
    found = metrics.regression(np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 4.0, 20.0, 8.0]))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4, 3], [2, 4, 20, 8])[0, 1])
    assert found["pearson"] < 1
    assert (found["mae"], found["loss"]) == (6.0, (1 + 4 + 256 + 25) / 4)


def test_scores_of_texts_and_spans():
    same = text_scores(["the film was great fun"], ["the film was great fun"])
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    assert same["rouge1"] == same["rouge2"] == same["rougeL"] == 1
    some = text_scores(["the film was dull"], ["the film was great"])
    assert some["rouge1"] == some["rougeL"] == pytest.approx(3 / 4)
    assert some["rouge2"] == pytest.approx(2 / 3)
    assert 0 < some["chrf"] < 100
    # One of two spans right; the other is cut short, which counts neither as found nor as right.
    found = spans([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]])
    assert found == {"f1": 0.5, "precision": 0.5, "recall": 0.5}


def test_perplexity_is_of_all_tokens():
    task, rows = bound("causal-lm", [{"text": "anna lives in rome"}] * 2, {"text": "text"}, small.model("gpt2"))
    found = task.score([(2.0, 1), (1.0, 5)], task.encode(rows))
    assert found["perplexity"] == pytest.approx(np.exp(3.0 / 6))
