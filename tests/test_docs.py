"""What README and docs/ show runs; their commands, flags, links and figures are those that there are."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

import adapters_kit as ak
from adapters_kit import cli, registry
from adapters_kit.arguments import flags_of, make_parser
from adapters_kit.recipe import known_flags
from tests.journeys import newcomers
from tests.support import small

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MINILM, SMOLLM = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
BLOCK = re.compile(
    r'(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"\n]+)")?\n(?P<text>.*?)^```',
    re.M | re.DOTALL,
)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, *languages):
    """The code of a page in its order; what a comment above excuses, with its reason, is left out."""
    found = [block for block in BLOCK.finditer(text_of(name)) if not languages or block["language"] in languages]
    return [block for block in found if not block["reason"]]


def commands_of(text):
    """The words of every adapters-kit command of a block, comments and continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r"(?:\$ )?(?:accelerate launch .* -m adapters_kit|adapters-kit) (.*)", line):
            yield shlex.split(found[1], comments=True)


def commands(name):
    """Those of a page, whether they run here or not."""
    for block in BLOCK.finditer(text_of(name)):
        if block["language"] in ("sh", "text"):
            yield from commands_of(block["text"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs that pages take up where others left them: folders by name."""
    folder = tmp_path_factory.mktemp("trained")
    return {
        "chat": ak.train(
            {"model": str(small.model("llama", chat=True)), "task": "causal-lm", "data": [TURNS] * 24,
             "training": {"max_steps": 2, "samples": 0}}, folder / "chat", quiet=True).path,
        **{name: ak.train(
            {"model": str(small.model("bert")), "task": "text-classification", "data": small.sentiment(48),
             "training": {"max_steps": 2, "samples": 0, "seed": seed}}, folder / name, quiet=True).path
           for seed, name in enumerate("ab")},
    }  # fmt: skip


TURNS = {
    "messages": [
        {"role": "user", "content": "where does anna live ?"},
        {"role": "assistant", "content": "anna lives in rome"},
    ]
}
RECIPE = f"model: {MINILM}\ntask: text-classification\ndata: reviews.csv\ntraining: {{max_steps: 2, samples: 0}}\n"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The files that the pages speak of, and tiny models in place of the hub's."""
    monkeypatch.chdir(tmp_path)
    rows = small.sentiment(48)
    for name, columns in {
        "reviews": "text,label",
        "tickets": "body,team",
        "other": "body,team",
        "new": "body,team",
    }.items():
        lines = [columns, *(f"{row['text']},{row['label']}" for row in rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    small.write_jsonl(tmp_path / "chats.jsonl", [TURNS] * 24)
    llama = str(small.model("llama", chat=True))
    (tmp_path / "model").symlink_to(llama)
    return {MINILM: str(small.model("bert")), SMOLLM: llama, LLAMA: llama}


def run_python(code, names):
    if "model.gguf" in code:
        pytest.importorskip("gguf")
        from tests.support.gguf_files import write

        write("llama", Path("model.gguf"), "Q4_1")
    exec(compile(code, "page", "exec"), names)


def run_command(words):
    """In this process; what serves or asks is only parsed, as by `test_commands_parse`."""
    if words[0] in ("serve", "ui", "chat"):
        return
    status = cli.main(words)
    assert status == 0 or (words[0] == "check" and status == 1), words


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES[1:] if blocks(name, "python", "sh")])
def test_pages_run(name, desk, trained):
    """Every block in its order in one folder, as a reader would go down the page."""
    for run, folder in trained.items():
        if f"runs/{run}" in text_of(name) and f"--out runs/{run}" not in text_of(name):
            shutil.copytree(folder, Path("runs") / run)
    if not any(words[0] == "init" for words in commands(name)):
        for recipe in ("reviews", "customer-a", "customer-b"):
            Path(f"{recipe}.yaml").write_text(RECIPE.replace(MINILM, desk[MINILM]))
    names = {"__name__": "__page__"}
    for block in blocks(name):
        text = block["text"]
        for hub_id, folder in desk.items():
            text = text.replace(hub_id, folder)
        text = re.sub(r"\d+GB", "0.6GB", text.replace("1024", "64"))  # the size of a tiny model
        if block["title"]:
            Path(block["title"]).write_text(text, encoding="utf-8")
        elif block["language"] == "python":
            run_python(text, names)
        elif block["language"] == "json":
            with Path("chats.jsonl").open("a", encoding="utf-8") as rows:
                rows.write(text)
        elif block["language"] == "toml":
            declared = tomllib.loads(text)["project"]["entry-points"][registry.GROUP]
        elif block["language"] == "sh":
            for words in commands_of(text):
                run_command(words)
                if words[0] == "init":
                    made = next(Path().glob("*.yaml"))
                    made.write_text(made.read_text().replace(MINILM, desk[MINILM]))
    if name == "docs/howto/method.md":
        assert [names[where.partition(":")[2]].name for where in declared.values()] == list(declared)
    if name == "docs/start.md":
        listed = re.findall(r"^  (\S+)", blocks(name, "text")[0]["text"], re.MULTILINE)
        assert len(listed) > 3 and all((Path("runs/reviews") / one).exists() for one in listed)


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run(path, desk):
    """Cell by cell; what a cell ends with shows itself, as a notebook would show it."""
    names = {"__name__": "__page__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "committed without outputs"
        code = "".join(cell["source"])
        for hub_id, folder in desk.items():
            code = code.replace(hub_id, folder)
        tree = ast.parse(code)
        shown = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if shown is not None:
            value = eval(compile(shown, path.name, "eval"), names)
            assert value is None or (getattr(value, "_repr_html_", None) or value.__repr__)()


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "yaml")])
def test_recipes_are_valid(name):
    """Whole ones as they stand, parts of one within a small one."""
    import yaml

    from adapters_kit.recipe import Recipe

    for block in blocks(name, "yaml"):
        rest = {"model": "m", "task": "text-classification", "data": "d.csv"}
        Recipe(**rest | yaml.safe_load(block["text"]))


@pytest.mark.parametrize("name", [name for name in NAMES if list(commands(name))])
def test_commands_parse(name):
    """Verbs and flags exist; a verb's required arguments are there."""
    parser, verbs = make_parser()
    for words in commands(name):
        assert words[0] in verbs, words
        verb = verbs[words[0]]
        if verb.get_default("takes_recipe_keys"):
            own, keys = flags_of(verb), known_flags()
            named = [word for word in words if word.startswith("--")]
            strange = [flag for flag in named if flag not in own and flag[2:] not in keys]
            assert all(re.match(r"--(method|data\.columns)\.", flag) for flag in strange), (words, strange)
            continue
        parser.parse_args(words)


def test_links_lead_somewhere():
    """mkdocs holds those between pages; these are README's, which start at the repository's address."""
    links = re.findall(r"adapters-kit/adapters-kit/(?:blob|raw)/HEAD/([^)#]+)(?:#([^)]+))?\)", text_of("README.md"))
    assert len(links) > 5
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, anchor


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) < 150


def test_the_readme_counts_peft_s_other_methods():
    others = set(registry.known_names()) - set(registry.names()) - {"prompt-tuning"}  # which is `prompt`
    assert f"and {len(others)} more of peft's" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    nav = text_of("mkdocs.yml").partition("\nnav:")[2]
    assert [name for name in NAMES if name.startswith("docs/") and name.removeprefix("docs/") not in nav] == []


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("made", ROOT / "docs" / "made.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_reference_names_everything(made):
    """Every public name, recipe key, verb, method and file."""
    names = made.python_names()
    assert all(f".{name}\n" in names for name in ak.__all__ if name not in ("__version__", "methods"))
    keys = made.recipe_keys()
    assert [key for key in known_flags() if f"`{key}`" not in keys] == []
    assert all(f"## {verb}\n" in made.commands() for verb in make_parser()[1])
    cards = made.method_cards()
    assert all(f"## {name}\n" in cards and registry.get(name).when for name in registry.names())
    house = made.house()
    files = (ROOT / "adapters_kit").rglob("*.py")
    assert [
        path.name for path in files if path.name not in ("__init__.py", "__main__.py") and path.name not in house
    ] == []


def quoted():
    """The messages that the page of troubles quotes in its headings."""
    return re.findall(r"^## `(.+)`$", text_of("docs/howto/troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_exist(message):
    """Each stands in one source file as it is printed, but for line breaks within a string."""
    wanted = re.sub(r"\W", "", re.sub(r"[A-Z]{3,}", "", message))
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "adapters_kit").rglob("*.py"))
    assert any(wanted in re.sub(r"\{.*?\}|\bf(?=[\"'])|\W", "", source) for source in sources), message


def test_every_table_is_the_measured_one():
    """And each table that can be drawn has its place."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import figures

    pages = [page.read_text(encoding="utf-8") for page in figures.PAGES]
    assert {name for page in pages for name in figures.names(page)} == set(figures.TABLES)
    for page in pages:
        assert figures.filled(page) == page
    for name, table in figures.TABLES.items():
        assert table().count("\n") >= 3, name


@pytest.mark.parametrize("number", range(1, len(newcomers.TEN) + 1))
def test_newcomers_type_what_stands_on_their_page(number):
    journey = newcomers.TEN[number - 1]
    page = f"docs/{journey.page}"
    written, programs = list(commands(page)), len(blocks(page, "python"))
    for step in journey.steps:
        if step.startswith(newcomers.PYTHON):
            assert 1 <= int(step.removeprefix(newcomers.PYTHON)) <= programs
        else:
            assert shlex.split(step)[1:] in written, f"{page} does not say: {step}"


@pytest.mark.slow
def test_the_readme_with_its_real_model(real, tmp_path, monkeypatch):
    reviews = (real("reviews") / "train.csv").read_text(encoding="utf-8").splitlines()[:97]
    (tmp_path / "reviews.csv").write_text("\n".join(reviews) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("README.md", "python"):
        exec(compile(block["text"].replace(MINILM, str(real("minilm"))), "README.md", "exec"), names)
    assert names["run"].metrics["accuracy"] > 0 and (tmp_path / "merged" / "config.json").is_file()
