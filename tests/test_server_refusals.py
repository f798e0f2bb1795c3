"""What anybody may send to `serve`: each gets one answer in the form that clients read, and the server goes on."""

import json
import socket
import threading
import time
from contextlib import closing

import pytest

import adapters_kit as ak
from adapters_kit.inference.served import Served
from adapters_kit.inference.server import _Handler, make_server
from tests.support import small

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("served") / "adapter"
    ak.wrap(ak.load(small.model("llama")), "lora").save_pretrained(folder)
    return Served({"tuned": folder}, task="causal-lm")


@pytest.fixture
def open_server(served):
    """Makes servers, which end with the test: (key) -> (port, lines of the log)."""
    made = []

    def make(key: str | None = None) -> tuple[int, list[str]]:
        lines: list[str] = []
        server = make_server(served, port=0, api_key=key, log=lines.append)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.append(server)
        return server.server_port, lines

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


def send(port: int, data: bytes, wait: float = 20) -> bytes:
    """What comes back until the connection is closed, or nothing comes for a second."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=wait)) as line:
        line.sendall(data)
        found = b""
        try:
            while piece := line.recv(65536):
                found += piece
                line.settimeout(1)
        except TimeoutError:
            pass
        return found


def request(body: bytes, *headers: str, path: str = "/v1/chat/completions", host: str = "127.0.0.1") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *headers]
    if not any(line.startswith("Content-Length") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 2, "temperature": 0} | fields).encode()


def outcome(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.decode().split("\r\n") if line.lower().startswith("content-length"))
    return int(head.split()[1]), json.loads(body[:length])


BODIES = {
    "deep": b'{"a":' * 50_000,
    "no JSON": b"{",
    "no object": b"[1]",
    "not UTF-8": b'{"messages": "\xff"}',
    "digits": b'{"seed": 1' + b"0" * 5000 + b"}",
    "messages deep": b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinite": b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": Infinity}',
}
FIELDS = {
    "max_tokens": [1e308, -1, 1.5, "2", [2], True, 2**70],
    "temperature": [-1, "hot", {}],
    "top_p": ["x", -0.1],
    "seed": ["abc", 1.5, -1, 2**70],
    "stop": [5, {"a": 1}, [1], [""], [["a"]]],
    "top_logprobs": ["abc", -1, [1]],
    "model": ["../../etc/passwd", "/etc/passwd", {"a": 1}, "\ud800"],
    "messages": [[], {}, [1], [{"role": 1, "content": "a"}], [{"role": "user", "content": [{"type": "image"}]}]],
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_none(case, open_server):
    port, lines = open_server()
    status, told = outcome(send(port, request(BODIES[case])))
    assert status == 400 and told["error"]["message"], told
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_kind(name, open_server):
    port, lines = open_server()
    for value in FIELDS[name]:
        status, told = outcome(send(port, request(chat(**{name: value}))))
        assert status in (400, 404) and name in told["error"]["message"], (value, told)
    assert not any("Traceback" in line for line in lines)
    assert outcome(send(port, request(chat())))[0] == 200, "it goes on"


def test_prompts_of_another_kind(open_server):
    port, _ = open_server()
    for prompt in (None, 7, [], [[]], [10**9], [-1], [True, "a"], {"a": 1}, [[1.5]]):
        body = json.dumps({"prompt": prompt, "max_tokens": 1}).encode()
        status, told = outcome(send(port, request(body, path="/v1/completions")))
        assert status == 400 and "prompt" in told["error"]["message"], (prompt, told)


def test_prompt_and_answer_fit_the_model(open_server, served):
    port, _ = open_server()
    body = {"prompt": [5] * (served.positions - 3), "max_tokens": 2**40, "temperature": 0}
    status, told = outcome(send(port, request(json.dumps(body).encode(), path="/v1/completions")))
    assert status == 200 and told["usage"]["completion_tokens"] <= 3
    body["prompt"] = [5] * (served.positions + 1)
    status, told = outcome(send(port, request(json.dumps(body).encode(), path="/v1/completions")))
    assert status == 400 and "positions" in told["error"]["message"]
    status, told = outcome(send(port, request(chat(messages=[{"role": "user", "content": "a b c " * 30_000}]))))
    assert status == 400 and "positions" in told["error"]["message"]


def test_text_that_no_tokenizer_takes_ends_no_server(open_server):
    port, _ = open_server()
    body = json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode()
    assert outcome(send(port, request(body)))[0] in (200, 400, 500)
    assert outcome(send(port, request(chat())))[0] == 200


@pytest.mark.parametrize("length", ["x", "-1", "\xb2", "9" * 5000, str(33 << 20), ""])
def test_a_length_that_is_none(length, open_server):
    port, _ = open_server()
    assert outcome(send(port, request(b"", f"Content-Length: {length}")))[0] == 400


def test_what_is_left_of_a_refused_request_is_no_request(open_server):
    port, lines = open_server("secret")
    inner = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = send(port, request(inner * 3))
    assert answer.count(b"HTTP/1.1") == 1 and b"401" in answer
    assert sum("GET" in line for line in lines) == 0


def test_another_name_for_this_machine_needs_a_key(open_server):
    port, _ = open_server()
    assert outcome(send(port, request(chat(), host="evil.example")))[0] == 403
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert outcome(send(port, request(chat(), host=host)))[0] == 200
    port, _ = open_server("secret")
    assert outcome(send(port, request(chat(), "Authorization: Bearer secret", host="my.example")))[0] == 200


def test_a_client_that_says_nothing_is_let_go(open_server, monkeypatch):
    monkeypatch.setattr(_Handler, "timeout", 0.3)
    port, _ = open_server()
    begun = time.monotonic()
    for data in (b"", b"POST /v1/chat/completions HTT", request(b"{", "Content-Length: 100")):
        assert b" 200 " not in send(port, data)
    assert time.monotonic() - begun < 15
    assert outcome(send(port, request(chat())))[0] == 200


def test_the_log_says_no_codes_to_a_terminal(open_server):
    port, lines = open_server()
    send(port, b"GET /\x1b[2J\x07 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert lines and all(line.isprintable() for line in lines)


def test_a_stream_that_breaks_says_so(open_server, served, monkeypatch):
    def broken(*_, **__):
        yield "a"
        raise KeyError("inside")

    monkeypatch.setattr(served, "write", broken)
    port, lines = open_server()
    answer = send(port, request(chat(stream=True)))
    assert b'"server_error"' in answer and b"[DONE]" not in answer and b"inside" not in answer
    assert any("KeyError" in line for line in lines), "whoever runs it sees the whole"
