"""The page of `adapters-kit ui`: who may see it, what it says of mistakes, and the whole road in a browser."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit.inference.answers import beside
from adapters_kit.ui.job import Job, curves
from tests.pages.test_pages import CHROMIUM, FLAGS
from tests.support import small

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> ak.Run:
    recipe = {
        "model": str(small.model("bert")), "task": "text-classification", "data": small.sentiment(32),
        "method": "lora", "training": {"epochs": 1, "batch_size": 8},
    }  # fmt: skip
    return ak.train(recipe, tmp_path_factory.mktemp("runs") / "first", quiet=True)


def test_base_and_tuned_answers_are_those_of_either_alone(run):
    base, tuned = beside(run, "a lovely film")
    assert tuned == ak.predict(run, "a lovely film")[0]
    assert base != tuned and set(base) == set(tuned)


def test_curves_leave_out_a_line_that_is_being_written(tmp_path):
    assert curves(tmp_path) == []
    lines = [{"step": 1, "loss": 0.5, "learning_rate": 1.0}, {"step": 2, "eval_accuracy": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert curves(tmp_path) == [
        {"step": 1, "series": "training loss", "value": 0.5},
        {"step": 2, "series": "accuracy", "value": 0.75},
    ]


@pytest.mark.slow
def test_a_job_tells_what_to_type_and_how_it_ended():
    job = Job(["init", "no such file.csv"])
    said = list(job.follow(0.05))[-1]
    assert said.startswith('$ adapters-kit init "no such file.csv"\n') and "no such file.csv" in said.partition("\n")[2]
    assert job.status == 2
    job.stop()  # nothing runs any more
    job.forget()


@pytest.mark.slow
@needs_gradio
def test_other_machines_are_let_in_only_with_a_token():
    from adapters_kit.ui.page import launch

    with pytest.raises(ak.AdapterError, match="token"):
        launch("0.0.0.0", 0)


@needs_gradio
@pytest.mark.parametrize("name", ["", "..", "../other", "/tmp/x", "a/b", "--out", ".hidden"])
def test_a_run_stays_in_the_folder_of_runs(name, tmp_path):
    from adapters_kit.ui.page import _folder

    with pytest.raises(ak.AdapterError, match="no name for a run"):
        _folder(tmp_path, name)


@needs_gradio
def test_mistakes_are_said_on_the_page(tmp_path):
    from adapters_kit.ui import page

    assert "Name the data first" in page._look(" ", "", "")[0]
    assert "absent.csv" in page._look("absent.csv", "", "")[0]
    assert "no recipe yet" in page._plan("", "")
    told = page._plan("model: m\ntask: text-clasification\ndata: d.csv\n", "")
    assert "text-classification" in told and "/tmp" not in told
    assert "unfinished" not in page._ask(tmp_path, "absent", "hello")[1] and page._ask(tmp_path, "absent", "hello")[1]


@pytest.fixture
def served(tmp_path) -> Iterator:
    """`served(*flags) -> address`: the page, run as on a terminal."""
    running = []

    def start(*flags: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "adapters_kit", "ui", "--port", "0", *flags],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
        )  # fmt: skip
        running.append(process)
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://[\w.:]+", line):
                return found[0]
        raise AssertionError("".join(said))

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) in (0, 130)
        finally:
            process.kill()
            process.stdout.close()


@pytest.mark.slow
@needs_gradio
def test_with_a_token_nothing_is_told_without_it(served):
    address = served("--token", "s3cret")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/config", timeout=30)
    assert refused.value.code == 401
    login = urllib.request.Request(f"{address}/login", data=b"username=me&password=guess")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(login, timeout=30)
    assert refused.value.code == 400
    login = urllib.request.Request(f"{address}/login", data=b"username=me&password=s3cret")
    assert urllib.request.urlopen(login, timeout=30).status == 200


@needs_gradio
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_whole_road_in_a_browser(served, tmp_path):
    """Data, plan, training, both answers, export, as a visitor clicks through them; nothing wider than the screen."""
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    small.write_jsonl(tmp_path / "reviews.jsonl", small.sentiment(60))
    address = served()
    wrong: list[str] = []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(300_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if address not in request.url
                and not request.url.startswith(("data:", "blob:")) else None)  # fmt: skip
        page.goto(address)

        def box(label: str):
            return page.get_by_role("textbox", name=label, exact=True)

        def says(label: str, text: str) -> None:
            browsers.expect(box(label)).to_have_value(re.compile(text), timeout=300_000)

        def press(name: str) -> None:
            page.get_by_role("button", name=name, exact=True).click()

        def tab(name: str) -> None:
            page.get_by_role("tab", name=name).click()

        box("Data").fill("reviews.jsonl")
        box("Model").fill(str(small.model("bert")))
        press("Look")
        says("What was recognised", "text is 'text', label is 'label'")
        browsers.expect(page.get_by_role("columnheader", name="label").first).to_be_visible()
        tab("2 Recipe and plan")
        press("Plan")
        says("Plan", "memory of one step")
        tab("3 Train")
        press("Train")
        says("Progress", "Run folder: runs/first")
        press("Train")
        says("Progress", "runs/first")  # a run of that name is there: refused, not lost
        assert (tmp_path / "runs" / "first" / "metrics.json").is_file()
        tab("4 Ask")
        box("Input").fill("a lovely film")
        press("Ask both")
        says("Tuned", "label: (good|bad)")
        says("Base, without what was trained", "label: (good|bad)")
        tab("5 Ship")
        page.get_by_label("export for peft").check()
        press("Do it")
        says("Result", "runs/first-peft")
        for width in (1400, 360):
            page.set_viewport_size({"width": width, "height": 900})
            for name in ("1 Data", "5 Ship"):
                if width == 1400:  # below, the tabs that do not fit are in a menu
                    tab(name)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert wrong == []
