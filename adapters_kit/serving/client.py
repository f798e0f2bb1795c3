"""An OpenAI-compatible server, asked for greedy tokens and log-probabilities in the shapes that servers answer in."""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from adapters_kit.artifacts.proof import Prompt
from adapters_kit.errors import ShippingError, did_you_mean

TOP = 5
_LARGEST = 16 << 20  # bytes of an answer


@dataclass(frozen=True)
class Reply:
    """One greedy answer.

    Attributes:
        text: of the answer.
        positions: (token, its likeliest alternatives -> log-probability) of each; empty without log-probabilities.
        prompt_tokens: how many tokens the server made of the prompt; None where it does not tell.
    """

    text: str
    positions: list[tuple[str, dict[str, float]]]
    prompt_tokens: int | None


class Server:
    """A server at an address.

    Attributes:
        url: without /v1.
        refused: why the last address was not served, in words.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ShippingError(f"{url!r} is not the address of a server: it starts with http:// or https://.")
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.timeout, self.refused = timeout, ""
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.takes_ids = True
        self.gone: set[str] = set()

    def pick(self, model: str | None) -> str:
        """The model to ask: the one named, if it is served; else the only one."""
        found = self._send("/v1/models", None)
        served = found.get("data") if found is not None else None
        names = [str(one["id"]) for one in served or () if isinstance(one, dict) and "id" in one]
        if model is None:
            if len(names) == 1:
                return names[0]
            raise ShippingError(f"Say which model to ask with model=: {self.url} serves {', '.join(names) or 'none'}.")
        if names and model not in names:
            raise ShippingError(f"{self.url} serves no model {model!r}. {did_you_mean(model, names)}")
        return model

    def complete(self, model: str, prompt: Prompt) -> Reply | None:
        """Ask for the rendered text's continuation; None where that is not served."""
        body = {"model": model, "max_tokens": len(prompt.positions), "temperature": 0, "logprobs": TOP}
        found = None
        if self.takes_ids:  # token ids leave the server's tokenizer nothing to add
            found = self._send("/v1/completions", body | {"prompt": prompt.ids})
            self.takes_ids = found is not None
        if found is None:
            found = self._send("/v1/completions", body | {"prompt": prompt.text})
        return None if found is None else _reply(found)

    def chat(self, model: str, prompt: Prompt) -> Reply | None:
        """Ask as a chat client does, which leaves the template to the server; None where that is not served."""
        body = {
            "model": model,
            "messages": prompt.messages,
            "max_tokens": len(prompt.positions),
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        found = self._send("/v1/chat/completions", body)
        return None if found is None else _reply(found)

    def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        """The answer; None where the server refuses the request, which `refused` then tells."""
        if path in self.gone:
            return None
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found = json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as error:
            told = error.read(4096).decode("utf-8", "replace")
            self.refused = f"It answered {error.code} to {path}: {told[:200].strip()}"
            if error.code in (401, 403):
                raise ShippingError(f"{self.url} wants another key. {self.refused}") from None
            if error.code in (404, 405):
                self.gone.add(path)
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "reason", error)
            raise ShippingError(f"{self.url}{path} did not answer as a server of models does: {reason}") from None
        return found if isinstance(found, dict) else None


def _reply(raw: dict[str, Any]) -> Reply:
    """An answer of /v1/completions or /v1/chat/completions."""
    try:
        choice = raw["choices"][0]
        message = choice.get("message") or {}
        text = str(choice.get("text") or message.get("content") or "")
        positions = _positions(choice.get("logprobs") or {})
        used = raw.get("usage") or {}
        count = used.get("prompt_tokens")
        return Reply(text, positions, count if isinstance(count, int) else None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ShippingError(f"An answer in no shape that is known ({error!r}): {str(raw)[:200]}") from None


def _positions(raw: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Both shapes: {"tokens", "top_logprobs": [{token: value}]}, and {"content": [{"token", "top_logprobs": […]}]}."""
    if isinstance(raw.get("content"), list):
        return [
            (str(one["token"]), _table({str(top["token"]): top["logprob"] for top in one.get("top_logprobs") or ()}))
            for one in raw["content"]
        ]
    tops = raw.get("top_logprobs") or ()
    return [(str(token), _table(top or {})) for token, top in zip(raw.get("tokens") or (), tops, strict=False)]


def _table(raw: dict[str, Any]) -> dict[str, float]:
    """Finite log-probabilities; the only ones that can be compared."""
    found = {str(token): float(value) for token, value in raw.items() if isinstance(value, int | float)}
    return {token: min(value, 0.0) for token, value in found.items() if math.isfinite(value)}
