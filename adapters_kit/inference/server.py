"""serve(): one base and several adapters behind an OpenAI-compatible address, with nothing but the standard library.

    GET  /health                    {"status": "ok"}
    GET  /v1/models                 the base and every adapter, by name
    POST /v1/chat/completions       messages, stream, temperature, top_p, max_tokens, stop, seed, logprobs
    POST /v1/completions            prompt (text or token ids, one or several), the same, and echo

Requests that wait while an answer is computed are answered together (`served`); what is streamed is computed by itself.
For many users merge and serve with vLLM, or give the adapter to a server that takes it (`adapters-kit check`).
"""

from __future__ import annotations

import hmac
import json
import re
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from adapters_kit.errors import AdapterError, DataError
from adapters_kit.inference.served import Served
from adapters_kit.inference.session import Sampling, Turn

_LOCAL = ("127.0.0.1", "localhost", "::1")
_LARGEST = 32 << 20  # bytes of a request
_HUGE = 1 << 63  # numbers of a request are below
_PATIENCE = 60.0  # seconds that a connection may send or take nothing


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        self.status, self.message, self.param = status, message, param
        super().__init__(message)


def make_server(
    served: Served, host: str = "127.0.0.1", port: int = 8000, *, api_key: str | None = None, log: Callable = print
) -> ThreadingHTTPServer:
    """The HTTP server, listening but not yet answering: call `serve_forever`.

    Args:
        port: 0 takes a free one; `server.server_port` tells.
        api_key: what a request has to bring as `Authorization: Bearer …`. Without it only this machine may ask.
        log: called with a line for each request.

    Raises:
        DataError: another host than this one without a key, or a port that is taken.
    """
    if host not in _LOCAL and not api_key:
        raise DataError(f"host={host!r} lets other machines ask: give api_key=SECRET too, or leave the host out.")

    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, served, api_key, log))
    except OSError as error:
        raise DataError(f"port={port}: {error.strerror} on {host}. Choose another, or 0 for a free one.") from error


class _Handler(BaseHTTPRequestHandler):
    """One connection: checks the key, finds the route, writes JSON or a stream of events."""

    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE  # of every read and write: a client that says nothing does not keep a thread for ever

    def __init__(self, served: Served, api_key: str | None, log: Callable, *connection: Any) -> None:
        self.served, self.api_key, self.log = served, api_key, log
        super().__init__(*connection)  # answers, and returns when the connection is closed

    def log_message(self, format: str, *args: Any) -> None:
        line = f"{self.address_string()} {format % args}"
        self.log("".join(one if one.isprintable() else repr(one)[1:-1] for one in line))  # no codes for the terminal

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, made: Callable[[], None]) -> None:
        try:
            self._check_host()
            self._check_key()
            made()
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            self.close_connection = True  # what is left of the request is no request of its own
            self._json(*_told(error, self.log))

    def _check_host(self) -> None:
        """Without a key only this machine asks; and a page of the web that its browser shows is not this machine, even
        if the name of its server leads here."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if not self.api_key and host not in (None, *_LOCAL):
            raise _Refused(HTTPStatus.FORBIDDEN, f"There is no host {host!r} here; without an API key ask localhost.")

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.api_key and self.path != "/health" and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "Wrong or missing API key: send Authorization: Bearer KEY.")

    def _get(self) -> None:
        if self.path == "/health":
            self._json({"status": "ok"})
        elif self.path == "/v1/models":
            rows = [
                {"id": name, "object": "model", "created": self.served.begun, "owned_by": "adapters-kit"}
                for name in self.served.names
            ]
            self._json({"object": "list", "data": rows})
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, f"There is no {self.path}; there are {', '.join(_ROUTES)}.")

    def _post(self) -> None:
        kind = _ROUTES.get(self.path)
        if kind is None:
            raise _Refused(HTTPStatus.NOT_FOUND, f"There is no {self.path}; there are {', '.join(_ROUTES)}.")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > _LARGEST:
            raise _Refused(HTTPStatus.BAD_REQUEST, "A request needs a Content-Length of at most 32 MiB.")
        try:
            body = json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"The body is not JSON: {error}.") from None
        if not isinstance(body, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "The body is not a JSON object.")
        request = kind(self.served, body)
        if body.get("stream"):
            self._events(request.stream())
        else:
            self._json(request.whole())

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _events(self, events: Iterator[dict[str, Any]]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in events:
                self._event(event)
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        except Exception as error:  # the answer has begun: there is no other status to be sent
            self._event(_told(error, self.log)[0])
        finally:
            events.close()  # type: ignore[attr-defined]
            self.close_connection = True

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()


def _told(error: Exception, log: Callable) -> tuple[dict[str, Any], HTTPStatus]:
    """What a client is told, and the status: what was asked is wrong, or something broke here."""
    param = None
    if isinstance(error, _Refused):
        status, message, param = error.status, error.message, error.param
    elif isinstance(error, AdapterError):
        status, message = HTTPStatus.BAD_REQUEST, str(error)
    else:
        status, message = HTTPStatus.INTERNAL_SERVER_ERROR, f"It broke here: {type(error).__name__}."
        log("".join(traceback.format_exception(error)))
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param}}, status


class _Request:
    """What both kinds of completion share: which model, how to draw, how it ended."""

    kind = ""

    def __init__(self, served: Served, body: dict[str, Any]) -> None:
        self.served, self.body = served, body
        self.model = str(body.get("model") or served.names[0])
        if self.model not in served.names:
            raise _Refused(
                HTTPStatus.NOT_FOUND, f"There is no model {self.model!r}; there are {', '.join(served.names)}.", "model"
            )
        if body.get("n", 1) != 1:
            raise _Refused(HTTPStatus.BAD_REQUEST, "n: one answer a request.", "n")
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"stop={stop!r}: a text or a list of texts is needed.", "stop")
        self.sampling = Sampling(
            max_new_tokens=self._number("max_completion_tokens", self._number("max_tokens", 256, 0), 0),
            temperature=self._number("temperature", 1.0, 0.0, float),
            top_p=self._number("top_p", 1.0, 0.0, float),
            seed=self._number("seed", None, 0),
            stop=tuple(stop),
        )
        self.id = f"{self.kind}-{uuid.uuid4().hex[:24]}"

    def _number(self, name: str, default: Any, least: float, kind: type = int) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < _HUGE
        if not fits or (kind is int and value != int(value)):
            what = "whole number" if kind is int else "number"
            raise _Refused(HTTPStatus.BAD_REQUEST, f"{name}={value!r}: a {what} of at least {least} is needed.", name)
        return kind(value)

    def _fit(self, ids: Sequence[int]) -> None:
        """Keeps prompt and answer within what the model has positions for."""
        asked, most = self.sampling.max_new_tokens, self.served.positions
        if len(ids) + min(asked, 1) > most:
            message = f"The prompt has {len(ids):,} tokens; the model has {most:,} positions for it and the answer."
            raise _Refused(HTTPStatus.BAD_REQUEST, message, "prompt")
        self.sampling = replace(self.sampling, max_new_tokens=min(asked, most - len(ids)))

    def _frame(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        frame = {"id": self.id, "object": object_, "created": int(time.time()), "model": self.model}
        return {**frame, "choices": choices, **more}

    def _text(self, new: Sequence[int]) -> tuple[str, str]:
        """The text of an answer's tokens, and why it ended."""
        text = self.served.writer.tokenizer.decode(list(new), skip_special_tokens=True)
        cuts = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        ended = bool(cuts) or len(new) < self.sampling.max_new_tokens or new[-1] in self._ends()
        return text[: min(cuts)] if cuts else text, "stop" if ended else "length"

    def _ends(self) -> list[int]:
        config = getattr(self.served.writer.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _usage(self, prompt: int, new: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class _Chat(_Request):
    kind = "chatcmpl"

    def __init__(self, served: Served, body: dict[str, Any]) -> None:
        super().__init__(served, body)
        self.ids = served.writer.ids_of_turns(_turns(body.get("messages")))
        self._fit(self.ids)

    def whole(self) -> dict[str, Any]:
        top = self._number("top_logprobs", 0, 0)
        new, logs = self.served.tokens(self.model, self.ids, self.sampling, top)
        text, reason = self._text(new)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": reason,
        }
        if self.body.get("logprobs"):
            choice["logprobs"] = {"content": [self._token(token, log) for token, log in zip(new, logs, strict=True)]}
        return self._frame("chat.completion", [choice], usage=self._usage(len(self.ids), len(new)))

    def _token(self, token: int, log: tuple[float, list[tuple[int, float]]]) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            text = self.served.writer.tokenizer.decode([token])
            return {"token": text, "token_id": token, "logprob": value, "bytes": list(text.encode())}

        return {**one(token, log[0]), "top_logprobs": [one(*other) for other in log[1]]}

    def stream(self) -> Iterator[dict[str, Any]]:
        def event(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return self._frame("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": reason}])

        yield event({"role": "assistant", "content": ""})
        for piece in self.served.write(self.model, self.ids, self.sampling):
            yield event({"content": piece})
        yield event({}, "stop")


class _Completion(_Request):
    kind = "cmpl"

    def __init__(self, served: Served, body: dict[str, Any]) -> None:
        super().__init__(served, body)
        given = body.get("prompt", "")
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        self.prompts = [self._ids(one) for one in several]
        self._fit(max(self.prompts, key=len))
        self.top = self._number("logprobs", -1, 0)

    def _ids(self, prompt: Any) -> list[int]:
        size = self.served.writer.model.get_input_embeddings().weight.shape[0]
        if isinstance(prompt, list) and prompt and all(isinstance(one, int) and 0 <= one < size for one in prompt):
            return prompt
        if isinstance(prompt, str) and prompt:
            return self.served.writer.ids_of_text(prompt)
        raise _Refused(HTTPStatus.BAD_REQUEST, "prompt: a text or a list of token ids, or a list of these.", "prompt")

    def whole(self) -> dict[str, Any]:
        choices, prompt_tokens, new_tokens = [], 0, 0
        for index, ids in enumerate(self.prompts):
            new, logs = self.served.tokens(self.model, ids, self.sampling, max(self.top, 0))
            text, reason = self._text(new) if new else ("", "length")
            shown: list[int] = new
            if self.body.get("echo"):
                text = self.served.writer.tokenizer.decode(ids, skip_special_tokens=True) + text
                shown = [*ids, *new]
                if self.top >= 0:
                    logs = [*self.served.prompt_logprobs(self.model, ids, self.top), *logs]
            made = self._logs(shown, logs) if self.top >= 0 else None
            choices.append({"index": index, "text": text, "finish_reason": reason, "logprobs": made})
            prompt_tokens, new_tokens = prompt_tokens + len(ids), new_tokens + len(new)
        return self._frame("text_completion", choices, usage=self._usage(prompt_tokens, new_tokens))

    def _logs(self, tokens: Sequence[int], logs: Sequence[Any]) -> dict[str, Any]:
        decode = self.served.writer.tokenizer.decode
        texts = [decode([token]) for token in tokens]
        return {
            "tokens": texts,
            "token_ids": list(tokens),
            "token_logprobs": [None if log is None else log[0] for log in logs],
            "top_logprobs": [None if log is None else {decode([t]): value for t, value in log[1]} for log in logs],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }

    def stream(self) -> Iterator[dict[str, Any]]:
        for index, ids in enumerate(self.prompts):
            for piece in self.served.write(self.model, ids, self.sampling):
                yield self._frame("text_completion", [{"index": index, "text": piece, "finish_reason": None}])
            yield self._frame("text_completion", [{"index": index, "text": "", "finish_reason": "stop"}])


_ROUTES: dict[str, Any] = {"/v1/chat/completions": _Chat, "/v1/completions": _Completion}


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise _Refused(HTTPStatus.BAD_REQUEST, "messages: a list of {role, content}.", "messages")
    turns = []
    for number, turn in enumerate(value, 1):
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):  # parts; only text is understood
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(part for part in parts if isinstance(part, str)) if len(parts) == len(content) else None
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(content, str):
            raise _Refused(HTTPStatus.BAD_REQUEST, f"messages: number {number} is not {{role, content}}.", "messages")
        turns.append({**turn, "content": content})
    return turns
