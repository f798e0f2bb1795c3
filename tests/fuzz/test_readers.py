"""Whatever lies in a file, a reader takes it or refuses it in an error of ours, in little time and memory.

Every reader has a file that it takes. Each input is that file with damage that files have: bytes flipped, cut, doubled
or put in; values of JSON replaced by others, keys lost or renamed. Flags are words in any order.

`make test` tries 500 inputs, `make fuzz` 10,000 (FUZZ_INPUTS): they are shared out among the readers.
"""

import copy
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import feather

import adapters_kit as ak
from adapters_kit.artifacts.adapter import read_adapter
from adapters_kit.artifacts.card import split
from adapters_kit.artifacts.checkpoint import open_checkpoint
from adapters_kit.artifacts.identity import check_base
from adapters_kit.artifacts.proof import Position, Prompt, Proof, read_proof
from adapters_kit.artifacts.record import record_base
from adapters_kit.errors import AdapterError
from adapters_kit.recipe import Recipe, known_flags
from adapters_kit.tasks.audio import open_audio, resampled
from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.images import open_image
from adapters_kit.tasks.template import ChatTemplate
from adapters_kit.training.data import read_rows
from tests.support import gguf_files, shipping, small

SECONDS, BYTES = 5, 200 * 2**20
ADAPTERHUB = Path(__file__).parents[1] / "fixtures" / "adapterhub" / "gpt2"

# Damage ---------------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ODD = st.sampled_from([-1, 0, 2**63, 1e308, "", "../..", "\x00", "lora", [], {}, [[[[]]]], float("nan"), float("inf")])
JSON = st.recursive(
    SCALARS | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
HOSTILE = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b'"', b"\\", b"{", b"[" * 3000, b"\x7f" * 8, b"\xff" * 8]


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """`good`, with one to three wounds."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        # Half of the wounds are near the start, where headers are.
        at = draw(st.integers(0, min(200, len(data))) | st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "replace"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64) | st.just(len(data)))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            new = draw(st.sampled_from(HOSTILE) | st.binary(max_size=12))
            data[at : at + (len(new) if kind == "replace" else 0)] = new
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, good: Any) -> Any:
    """`good`, with one to three places changed."""
    made = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        inside, key = None, None
        value = made
        while isinstance(value, dict | list) and value and (inside is None or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            inside, value = value, value[key]
        if inside is None:
            return draw(JSON)
        kind = draw(st.sampled_from(["replace", "lose", "rename"]))
        if kind == "replace":
            inside[key] = draw(JSON)
        else:
            lost = inside.pop(key)
            if kind == "rename" and isinstance(inside, dict):
                inside[draw(st.text(max_size=6))] = lost
    return made


def as_file(good: Any) -> st.SearchStrategy[bytes]:
    """Damage to a JSON document: to what it says, or to its bytes."""
    text = json.dumps(good).encode()
    return damaged_json(good).map(lambda value: json.dumps(value).encode()) | damaged_bytes(text)


TEMPLATE = """{%- for m in messages %}{% if m['role'] == 'user' %}<u>{{ m.content | trim }}{% else %}
<a>{{ m.content }}</a>{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a>' + '-' * 3 }}{% endif %}"""


# Readers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One good file of every kind; each test damages its own."""
    root = tmp_path_factory.mktemp("fuzz")
    base = shipping.save_base("llama", root / "base")
    model = ak.wrap(ak.load(base, "causal-lm"), "lora", r=2)
    model.save_pretrained(root / "adapter")
    record_base(root / "adapter", base)
    gguf_files.write("llama", root / "model.gguf", "Q8_0")
    chat = {"messages": [{"role": "user", "content": "a"}]}
    small.write_jsonl(root / "rows.jsonl", [{**row, **chat} for row in small.sentiment(4)])
    (root / "rows.json").write_text(json.dumps(small.questions(3)), encoding="utf-8")
    (root / "rows.csv").write_text('text,label\n"a, ""b""",1\nc,02\n', encoding="utf-8")
    (root / "rows.tsv").write_text("text\tlabel\na\t1\nb\t2\n", encoding="utf-8")
    (root / "rows.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (root / "rows.conll").write_text("a B-X\nb O\n\nc O\n", encoding="utf-8")
    (root / "rows.ft").write_text("__label__a one two\n__label__b three\n", encoding="utf-8")
    (root / "rows.csv.gz").write_bytes(gzip.compress((root / "rows.csv").read_bytes()))
    table = pa.table({"text": ["a", "b"], "label": [1, 2], "words": [["a"], []]})
    pq.write_table(table, root / "rows.parquet")
    feather.write_feather(table, root / "rows.arrow", compression="uncompressed")
    soundfile.write(root / "sound.wav", np.linspace(-0.5, 0.5, 400), 44_100)
    Image.new("RGB", (16, 16), "red").save(root / "picture.png")
    (root / "README.md").write_text("---\nlicense: mit\ntags: [a, {b: c}]\n---\n# Mine\n", encoding="utf-8")
    told = [Position("a", {"a": -0.5, "b": -3.0}, {"a": -1.0, "b": -2.0})]
    Proof("float32", 0.1, [Prompt("a", [1], None, told, ["b"])]).write(root)
    (root / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    fields = {"model": "m", "task": "causal-lm", "data": "d.jsonl", "method": {"name": "lora", "r": 4}}
    recipe = Recipe(**fields, training={"epochs": 2, "learning_rate": 1e-3})
    (root / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for run in ("run", "other"):
        (root / run).mkdir()
        (root / run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (root / run / "metrics.json").write_text(
            json.dumps({"loss": 1.0, "base_loss": 2.0, "steps": 3}), encoding="utf-8"
        )
    return root


def _bytes(path: Path) -> st.SearchStrategy[bytes]:
    return damaged_bytes(path.read_bytes())


def _json(path: Path) -> st.SearchStrategy[bytes]:
    return as_file(json.loads(path.read_text(encoding="utf-8")))


# name -> the file that is damaged, how, and what reads it (given the folder of `place`)
READERS: dict[str, tuple[str, Callable[[Path], st.SearchStrategy[bytes]], Callable[[Path], Any]]] = {
    "recipe": ("recipe.yaml", _bytes, lambda root: Recipe.read(root / "recipe.yaml")),
    "run": ("run/metrics.json", _json, lambda root: ak.compare_runs([root / "run", root / "other"])),
    "run's recipe": ("run/recipe.yaml", _bytes, lambda root: ak.Run.open(root / "run")),
    "adapter's config": ("adapter/adapter_config.json", _json, lambda root: read_adapter(root / "adapter")),
    "adapter's weights": ("adapter/adapter_model.safetensors", _bytes, lambda root: read_adapter(root / "adapter")),
    "record": ("adapter/adapters_kit.json", _json, lambda root: check_base(root / "adapter", root / "base")),
    "check": ("adapter/adapter_config.json", _json, lambda root: ak.check(root / "adapter", "vllm")),
    "base": ("base/model.safetensors", _bytes, lambda root: _headers(root / "base")),
    "gguf": ("model.gguf", _bytes, lambda root: ak.load(root / "model.gguf", "causal-lm")),
    "jsonl": ("rows.jsonl", _bytes, lambda root: read_rows(root / "rows.jsonl")),
    "json": ("rows.json", _json, lambda root: read_rows(root / "rows.json")),
    "csv": ("rows.csv", _bytes, lambda root: read_rows(root / "rows.csv")),
    "tsv": ("rows.tsv", _bytes, lambda root: read_rows(root / "rows.tsv")),
    "text": ("rows.txt", _bytes, lambda root: read_rows(root / "rows.txt")),
    "conll": ("rows.conll", _bytes, lambda root: read_rows(root / "rows.conll")),
    "fasttext": ("rows.ft", _bytes, lambda root: read_rows(root / "rows.ft")),
    "gzip": ("rows.csv.gz", _bytes, lambda root: read_rows(root / "rows.csv.gz")),
    "parquet": ("rows.parquet", _bytes, lambda root: list(read_rows(root / "rows.parquet"))),
    "arrow": ("rows.arrow", _bytes, lambda root: list(read_rows(root / "rows.arrow"))),
    "sound": ("sound.wav", _bytes, lambda root: resampled(open_audio(str(root / "sound.wav"), 0), 16_000)),
    "picture": ("picture.png", _bytes, lambda root: open_image(str(root / "picture.png"), 0)),
    "card": ("README.md", _bytes, lambda root: split((root / "README.md").read_text(errors="replace"))),
    "proof": ("proof.json", _json, lambda root: read_proof(root)),
    "template": ("template.jinja", _bytes, lambda root: _rendered(root / "template.jinja")),
    "adapter, wrapped": ("adapter/adapter_config.json", _json, lambda root: _wrapped(root)),
    "adapter, merged": ("adapter/adapter_config.json", _json, lambda root: _merged(root)),
    "base's config": ("base/config.json", _json, lambda root: ak.load(root / "base", "causal-lm")),
}
INPUTS = int(os.environ.get("FUZZ_INPUTS", "500")) // (len(READERS) + 1)
CAREFUL = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize=INPUTS < 100,  # make test says the same every time; make fuzz finds new inputs
    suppress_health_check=list(HealthCheck),
)


def _rendered(file: Path) -> str:
    tokenizer = small.tokenizer(encoder=False)
    tokenizer.chat_template = file.read_text(encoding="utf-8", errors="replace")
    talk = Conversation([{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}], None)
    return ChatTemplate(tokenizer, "m").render(talk, row=0)


def _wrapped(root: Path) -> None:
    ak.wrap(ak.load(root / "base", "causal-lm"), root / "adapter")


def _merged(root: Path) -> None:
    ak.merge(root / "adapter", root / "merged", base=root / "base", verify="off", overwrite=True)


def _headers(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def _peak() -> int:
    """The most memory that this process has held since the last call, in bytes; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def taken_or_refused(read: Callable[[], Any]) -> None:
    """Runs `read`. Only errors of ours may come out, within the time and the memory that are allowed."""
    _peak()
    before, started = psutil.Process().memory_info().rss, time.process_time()
    try:
        read()
    except AdapterError as error:
        assert str(error).strip(), "an error says something"
    assert time.process_time() - started <= SECONDS
    assert _peak() - before <= BYTES


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, place):
    file, damage, read = READERS[name]
    path = place / file
    good = path.read_bytes()
    read(place)  # the good file is taken: what follows tests the reader, not the preparation

    @CAREFUL
    @given(damage(path))
    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        taken_or_refused(lambda: read(place))

    try:
        attempt()
    finally:
        path.write_bytes(good)


STRANGE = [
    "--",
    "-",
    "--=",
    "--method.r=",
    "--data.columns.",
    "--a.b.c",
    "nan",
    "[",
    "{a: ",
    "&x",
    "*x",
    "!!python/name:os",
]
WORDS = st.sampled_from([*(f"--{key}" for key in known_flags()), *STRANGE]) | st.text(max_size=8)


@CAREFUL
@given(st.lists(WORDS, max_size=6))
def test_flags_are_taken_or_refused(flags):
    taken_or_refused(lambda: Recipe.read(None, flags))
