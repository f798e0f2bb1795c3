"""prove(): servers that answer rightly, from the base, through another template, rounded, at another scale."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import peft
import pytest
import torch
import transformers

import adapters_kit as ak
from adapters_kit.artifacts.proof import ASKED, Position, Prompt, make_proof, read_proof, runner
from adapters_kit.cli import main
from adapters_kit.serving.client import Reply
from adapters_kit.serving.evidence import measure
from tests.support import small
from tests.support.shipping import LLAMA_LINEARS, disturb


class Stub:
    """A server that greedily writes on with a model, in the shapes of vLLM and OpenAI.

    Args:
        template: the chat template that it renders conversations with; None is the tokenizer's own.
        completions, chat, logprobs, ids: whether it has these addresses, gives log-probabilities and takes token ids.
    """

    def __init__(self, model, tokenizer, *, template=None, completions=True, chat=True, logprobs=True, ids=True):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.paths = {"/v1/completions"} if completions else set()
        self.paths |= {"/v1/chat/completions"} if chat else set()
        self.logprobs, self.ids = logprobs, ids

    def answer(self, path, body):
        if path not in self.paths:
            return 404, {"error": "Not Found"}
        if "prompt" in body:
            prompt = body["prompt"]
            if isinstance(prompt, list) and not self.ids:
                return 422, {"error": "prompt: a string is wanted"}
            ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True, chat_template=self.template
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        new, tops = [], []
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                values = self.model(torch.tensor([ids + new])).logits[0, -1].log_softmax(-1)
            best = values.topk(5)
            tops.append({self.name(i): v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)})
            new.append(int(best.indices[0]))
        names = [self.name(token) for token in new]
        choice = {"index": 0, "finish_reason": "length"}
        if "prompt" in body:
            choice["text"] = "".join(names)
            choice["logprobs"] = {"tokens": names, "top_logprobs": tops} if self.logprobs else None
        else:
            choice["message"] = {"role": "assistant", "content": "".join(names)}
            content = [
                {"token": n, "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}
                for n, top in zip(names, tops, strict=True)
            ]
            choice["logprobs"] = {"content": content} if self.logprobs else None
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def name(self, token):
        before = self.tokenizer.decode([5])
        return self.tokenizer.decode([5, token])[len(before) :]

    @contextmanager
    def running(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def send(self, status, value):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def do_GET(self):
                self.send(200, {"data": [{"id": "tuned"}]})

            def do_POST(self):
                self.send(*stub.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """(adapter folder with its proof, live tuned model, base, tokenizer)."""
    folder = tmp_path_factory.mktemp("proof")
    base = small.model("llama", chat=True, vocab_size=67)
    tokenizer = ak.load_processor(base)
    torch.manual_seed(0)
    tuned = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(tuned, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA_LINEARS))
    disturb(tuned, 0.2)
    tuned.save_pretrained(folder / "adapter")
    ak.record(folder / "adapter", base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    make_proof(runner(tuned.eval()), runner(plain), tokenizer, "float32").write(folder / "adapter")
    return folder / "adapter", tuned, plain, tokenizer


def scaled(tuned, factor):
    """A copy with every update times a factor."""
    import copy

    made = copy.deepcopy(tuned)
    for module in made.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.scaling["default"] *= factor
    return made


def rounded(tuned, steps=6):
    """A merged copy whose linears hold few values a row, as an 8-bit file's do."""
    import copy

    made = copy.deepcopy(tuned).merge_and_unload()
    for module in made.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax(-1, keepdim=True) / steps
            module.weight.data = (module.weight / scale).round() * scale
    return made


def asked(shipped, model, **options):
    adapter, _, _, tokenizer = shipped
    with Stub(model, tokenizer, **options).running() as url:
        return ak.prove(url, adapter)


@pytest.mark.slow
def test_the_tuned_model_and_the_base(shipped):
    _, tuned, plain, _ = shipped
    for options in ({}, {"ids": False}, {"completions": False}, {"chat": False}, {"logprobs": False}):
        right, wrong = asked(shipped, tuned, **options), asked(shipped, plain, **options)
        assert (right.verdict, wrong.verdict) == ("the tuned model", "the base"), (options, str(right), str(wrong))
        assert right and not wrong
        if options.get("logprobs", True):
            one = right.completions or right.chat
            assert one.tuned < 1e-4 < one.base and one.strength == pytest.approx(1, abs=0.01)


def test_another_template(shipped):
    _, tuned, _, _ = shipped
    other = "{% for m in messages %}user {{ m['content'] }} {% endfor %}good"
    report = asked(shipped, tuned, template=other)
    assert report.verdict == "another template" and report.status == 4 and not report
    assert "tokens there" in str(report)
    assert asked(shipped, tuned, template=other, completions=False).verdict == "another template"


def test_rounded_weights_and_a_wrong_scale(shipped):
    _, tuned, _, _ = shipped
    report = asked(shipped, rounded(tuned))
    assert report.verdict == "quantized" and report.status == 5 and report
    assert report.completions.tuned < report.completions.base / 2
    for factor in (0.4, 2.0):
        report = asked(shipped, scaled(tuned, factor))
        assert report.verdict == "cannot tell" and "scale" in str(report), str(report)


def test_an_adapter_that_changes_nothing_proves_nothing(shipped, tmp_path):
    _, _, plain, tokenizer = shipped
    make_proof(runner(plain), runner(plain), tokenizer, "float32").write(tmp_path)
    with Stub(plain, tokenizer).running() as url:
        report = ak.prove(url, tmp_path)
    assert report.verdict == "cannot tell" and report.status == 6


def test_merge_carries_the_proof_or_makes_one(shipped, tmp_path):
    adapter, tuned, plain, tokenizer = shipped
    ak.merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged/proof.json").read_bytes() == (adapter / "proof.json").read_bytes()
    tuned.save_pretrained(tmp_path / "bare")
    ak.record(tmp_path / "bare", plain.config._name_or_path)
    report = ak.merge(tmp_path / "bare", tmp_path / "again")
    assert "prove" in str(report)
    assert len(read_proof(tmp_path / "again").prompts[0].positions) == 1
    for model, verdict in ((tuned, "the tuned model"), (plain, "the base")):
        with Stub(model, tokenizer).running() as url:
            assert ak.prove(url, tmp_path / "again").verdict == verdict
    ak.export(adapter, tmp_path / "shipped")
    assert (tmp_path / "shipped/proof.json").is_file()


@pytest.mark.slow
def test_train_leaves_a_proof_without_rows_of_the_data(tmp_path):
    rows = [{"prompt": f"where does {q['name']} live ?", "completion": q["answer"]} for q in small.questions(24)]
    data = small.write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = {
        "model": str(small.model("llama", chat=True, vocab_size=67)),
        "task": "causal-lm",
        "method": {"name": "lora", "r": 4},
        "data": {"train": str(data), "test_size": 4},
        "training": {"epochs": 2, "learning_rate": 0.02, "batch_size": 8},
    }
    run = ak.train(recipe, tmp_path / "run", quiet=True)
    proof = read_proof(run.path / "adapter")
    assert {prompt.messages[0]["content"] for prompt in proof.prompts} <= set(ASKED)
    from adapters_kit.inference.server import Served, make_server

    server = make_server(Served({"mine": run.path}), port=0, log=lambda line: None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        report = ak.prove(url, run.path, model="mine")
        assert report.verdict == "the tuned model", str(report)
        assert main(["prove", url, "--adapter", str(run.path), "--model", "mine"]) == 0
        base = small.model("llama", chat=True, vocab_size=67).name
        report = ak.prove(url, run.path, model=base)
        assert report.verdict == "the base", str(report)
        assert main(["prove", url, "--adapter", str(run.path), "--model", base]) == 3
        with pytest.raises(ak.AdapterError, match="Did you mean"):
            ak.prove(url, run.path, model="mime")
        with pytest.raises(ak.AdapterError, match="Say which model"):
            ak.prove(url, run.path)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_is_no_server_and_no_proof_is_told(shipped, tmp_path):
    adapter = shipped[0]
    with pytest.raises(ak.AdapterError, match="did not answer"):
        ak.prove("http://127.0.0.1:9", adapter, model="x", timeout=2)
    with pytest.raises(ak.AdapterError, match="http://"):
        ak.prove("localhost:8000", adapter)
    for broken in ("{", "[]", '{"format": 1}', '{"format": 1, "dtype": 3, "tolerance": "x", "prompts": []}'):
        (tmp_path / "proof.json").write_text(broken)
        with pytest.raises(ak.AdapterError, match="proof"):
            ak.prove("http://127.0.0.1:9", tmp_path)


def test_a_token_that_the_tokenizer_adds_by_itself_is_not_sent_twice():
    from adapters_kit.artifacts.proof import _rendered

    tokenizer = small.tokenizer(encoder=True, chat=True)
    tokenizer.add_special_tokens({"bos_token": "[CLS]"})
    tokenizer.chat_template = "[CLS] {{ messages[0]['content'] }}"
    prompt = _rendered(tokenizer, "good film")
    assert isinstance(prompt, Prompt) and not prompt.text.startswith("[CLS]") and prompt.ids[0] == 1


@pytest.mark.parametrize("spaces", [True, False], ids=["spaces named", "spaces left out"])
def test_two_tokens_that_a_space_tells_apart_are_two(spaces):
    """And a token that we have no name for, a part of a character, is no difference."""
    tuned, base = {" we": -1.0, "no": -1.5, " so": -3.0}, {" we": -2.0, "no": -0.7, " so": -3.0}
    prompt = Prompt("x", [5], None, [Position(" we", tuned, base)], ["no"])
    own = {"we": -3.5} if spaces else {}
    top = {(token if spaces else token.strip()): value for token, value in tuned.items()} | own
    for answer in (top, top | {"\N{REPLACEMENT CHARACTER}": -2.6}):
        found = measure([(prompt, Reply("", [(" we", answer)], None))])
        assert found.tuned < 1e-3 < found.base and found.strength == pytest.approx(1)
