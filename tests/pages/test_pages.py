"""report.html: one file without network, nothing wider than the screen, no script that fails; and its pictures."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapters_kit as ak
from adapters_kit import tasks
from adapters_kit.pages.comparison_page import table_page, write_table_page
from adapters_kit.pages.explanation_page import explanation_page
from adapters_kit.pages.run_page import run_page, write_run_page
from adapters_kit.pages.verdict import LESS_IS_BETTER, verdict
from adapters_kit.task_table import TASKS
from adapters_kit.training import pictures
from tests.support import small

pytestmark = pytest.mark.pictures
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                 if Path(path).exists()), None)  # fmt: skip
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
NAMES = {
    "two": ["bad", "good"],
    "six long": [f"a rather long class name with the number {i}" for i in range(6)],
    "hundred": [f"intent_{i}" for i in range(100)],
    "east asian": ["良い", "悪い", "とても良いレビューですよ本当に", "중립", "负面评论"],
    "hostile": ["<script>throw 1</script>", "a & b", '"quoted"', "$x_1$"],
}


def matrix(size: int, right: float, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    counts = [[0] * size for _ in range(size)]
    for true in range(size):
        for _ in range(20):
            counts[true][true if draw.random() < right else draw.randrange(size)] += 1
    return counts


def made_run(folder: Path, labels: list[str]) -> Path:
    """The files of a run with awkward content."""
    folder.mkdir(parents=True)
    scores = {"accuracy": 0.85, "loss": 0.4}
    costs = {"trainable_params": 814_000, "total_params": 22_000_000, "train_seconds": 71.2, "steps": 125}
    costs |= {"tokens_per_second": 3121.5, "peak_memory_bytes": 2**30, "train_examples": 2000, "test_examples": 300}
    base = {"base_accuracy": 0.3, "base_loss": 1.2}
    long = "w" * 400 + " <b>not bold</b> 良い"
    files = {
        "metrics.json": json.dumps({**base, **scores, **costs, "notes": ["3 rows were left out."]}),
        "metrics.jsonl": json.dumps({"step": 17, "loss": 0.5, "learning_rate": 1e-4}) + "\n"
        + json.dumps({"step": 17, "eval_loss": 0.4, "eval_accuracy": 0.85}) + "\n",
        "confusion.json": json.dumps(
            {"labels": labels, "base": matrix(len(labels), 0.3), "tuned": matrix(len(labels), 0.85)}
        ),
        "details.json": json.dumps(
            {
                "model": "m/" + "x" * 120, "task": "text-classification", "method": "lora", "metric": "accuracy",
                "worst": [{"input": long, "row": 3, "true": labels[0], "predicted": labels[1], "probability": 0.9}],
                "lengths": {"training data": {"examples": 3, "counts": [1, 2], "edges": [3, 9, 15]}},
            }
        ),
        "samples.jsonl": json.dumps({"base": {"text": long, "label": labels[0]}, "tuned": {"label": labels[1]}}) + "\n",
        "recipe.yaml": "model: m\n# " + "y" * 300 + "\n",
        "environment.json": json.dumps({"python": "3.11", "gpus": [], "platform": "z" * 200}),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


class Inside(HTMLParser):
    """Tags and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value]


def comparison(folder: Path) -> Path:
    rows = [
        {"method": name, "accuracy": 0.8 + i / 300, "trainable_params": 7 * 10 ** (3 + i % 4), "train_seconds": 30 + i,
         "peak_memory_bytes": 10**9 + i} for i, name in enumerate(["full", "lora", "dora", "ia3", "a-very-long-name"])
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return write_table_page(folder, "a comparison", rows, "accuracy", "method", ["A note."])


@pytest.mark.parametrize("kind", NAMES)
def test_a_page_fetches_nothing_and_takes_nobodys_words_for_markup(kind, tmp_path):
    page = run_page(made_run(tmp_path / "run", NAMES[kind]))
    inside = Inside()
    inside.feed(page)
    assert [url for url in inside.fetched if not url.startswith(("data:", "#"))] == []
    assert not re.search(r"url\(\s*['\"]?http", page)
    assert inside.tags.count("script") == 1 and "b" in inside.tags and "<b>not bold" not in page


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.mark.parametrize("kind", [*NAMES, "comparison"])
def test_in_a_browser_nothing_fails_and_nothing_is_wider_than_the_screen(kind, browser, tmp_path):
    folder = tmp_path / "run"
    path = comparison(folder) if kind == "comparison" else write_run_page(made_run(folder, NAMES[kind]))
    for width in (360, 1400):
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            wrong: list[str] = []
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.on("console", lambda line, wrong=wrong: wrong.append(line.text) if line.type == "error" else None)
            page.on("requestfailed", lambda request, wrong=wrong: wrong.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ink, paper = page.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            assert ink != paper and wrong == []
            page.close()


def test_a_click_sorts_by_the_numbers(browser, tmp_path):
    page = browser.new_page()
    page.goto(comparison(tmp_path / "c").as_uri())
    column = "[...document.querySelectorAll('tbody tr')].map(row => row.children[2].dataset.value)"
    head = page.locator("th button", has_text="trainable_params")
    head.click()
    assert page.evaluate(column) == sorted(page.evaluate(column), key=int)
    head.click()
    assert page.evaluate(column) == sorted(page.evaluate(column), key=int, reverse=True)
    page.close()


@pytest.mark.parametrize("kind", NAMES)
def test_pictures_of_many_long_and_foreign_names(kind, tmp_path, recwarn):
    labels = NAMES[kind]
    pictures.confusion(matrix(len(labels), 0.3), matrix(len(labels), 0.9), labels, tmp_path / "c.png")
    from PIL import Image

    with Image.open(tmp_path / "c.png") as image:
        assert image.width <= 2400 and image.height <= 1600
    assert not [str(one.message) for one in recwarn if "Glyph" in str(one.message) or "overlap" in str(one.message)]
    names, _ = pictures._writable(labels)
    assert len(set(names)) == len(labels), "names that are cut can still be told apart"


def test_one_logged_point_is_drawn(tmp_path):
    history = [{"step": 17, "loss": 0.5, "learning_rate": 1e-4}, {"step": 17, "eval_loss": 0.4, "eval_accuracy": 0.5}]
    pictures.curves(history, {"loss": 0.7, "accuracy": 0.4}, "accuracy", tmp_path / "c.png")
    page = run_page(made_run(tmp_path / "run", NAMES["two"]))
    assert page.count("<svg") >= 3 and "16.2" not in page


def test_names_beside_points_cover_no_other_name():
    from matplotlib.figure import Figure

    from adapters_kit.pages.plots import place_names

    figure = Figure(figsize=(5, 4))
    axis = figure.subplots()
    names = ["lora", "dora", "parallel", "houlsby", "pfeiffer", "full"]
    x, y = [1.0, 1.01, 1.02, 1.0, 1.03, 2.0], [80.0, 80.01, 80.0, 80.02, 80.01, 80.0]
    axis.scatter(x, y)
    axis.margins(0.2)
    place_names(figure, axis, names, x, y)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


WORSE = {"base_accuracy": 0.30, "accuracy": 0.27, "base_loss": 1.0, "loss": 0.9, "steps": 17, "test_examples": 27}


def test_a_run_that_got_worse_says_so_first():
    sentence, better = verdict(WORSE)
    assert not better and sentence.startswith("The adapter is no better than the base model: accuracy 0.3 → 0.27")
    assert verdict({**WORSE, "advice": ["Try more."]}) == (sentence, False), "what to try is said by itself, once"
    assert verdict({"base_perplexity": 9.0, "perplexity": 7.0})[1] and not verdict({"base_loss": 1.0, "loss": 1.1})[1]


@pytest.mark.slow
def test_a_run_is_judged_by_the_score_of_its_task():
    better = {"base_loss": 4.0, "loss": 3.0, "base_exact_match": 0.0, "exact_match": 0.0, "base_f1": 0.0, "f1": 0.5}
    assert verdict(better, "loss") == ("loss 4 → 3.", True) and verdict(better, "f1") == ("f1 0 → 0.5.", True)
    assert not verdict(better, "exact_match")[1]
    words = {"base_loss": 2.0, "loss": 1.0, "base_perplexity": 7.4, "perplexity": 2.7, "base_wer": 0.5, "wer": 0.2}
    assert verdict(words, "loss") == ("perplexity 7.4 → 2.7.", True) and verdict(words, "wer")[1]


def test_every_task_agrees_about_which_way_its_score_gets_better():
    for name in TASKS:
        task = tasks.get(name)
        assert task.higher_is_better == (task.metric not in LESS_IS_BETTER), name


@pytest.mark.slow
def test_a_run_writes_its_page_and_shows_itself_in_a_notebook(tmp_path):
    recipe = {"model": str(small.model("bert")), "task": "text-classification", "data": small.sentiment(32),
              "training": {"max_steps": 2, "log_every": 1}}  # fmt: skip
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    for title in ("Scores", "Curves", "Which class is taken for which", "Lengths", "Load it", "Recipe", "Environment"):
        assert f"<h2>{title}</h2>" in page
    assert "accuracy" in run._repr_html_() and "<pre>" in ak.plan(run.recipe)._repr_html_()
    worst = json.loads((run.path / "details.json").read_text())["worst"]
    truth = {row["text"]: row["label"] for row in small.sentiment(32)}
    assert all(truth[one["input"]] == one["true"] != one["predicted"] for one in worst)
    table = ak.sweep(recipe, tmp_path / "sweep", learning_rates=[1e-4, 1e-3], quiet=True)
    assert "<button>accuracy</button>" in table._repr_html_() and (tmp_path / "sweep" / "report.html").is_file()
    assert "accuracy" in table_page("t", table, "accuracy", "run")


def test_a_page_of_explanations_shows_hostile_text_as_text():
    hostile = '<script>throw 1</script>"&'
    common = {"of": hostile, "unit": "log-probability", "value": -0.1, "nothing": -2.0, "error": 1e-3}
    text = SimpleNamespace(**common, tokens=((hostile, 1.5), ("##x", -0.5), ("[SEP]", 0.0)), regions=None, picture="")
    image = SimpleNamespace(**common, tokens=(), regions=((0.5, -0.5),), picture="data:image/png;base64,AAAA")
    still = SimpleNamespace(**common, tokens=(("a", 0.0),), regions=None, picture="")
    page = explanation_page(hostile, [{hostile: hostile}, {"answer": ""}], [[text, image, still], []])
    assert "<script>throw" not in page and page.count("&lt;script&gt;throw 1&lt;/script&gt;&quot;&amp;") >= 7
    assert not re.search(r"(src|href)=.(?!data:)", page) and "nan" not in page
    assert "prefers-color-scheme: dark" in page and "Nothing to explain." in page
