"""How a folder is started in a server, ready to paste: vLLM's command line, Ollama's Modelfile with the template.

Ollama's templates are in Go's language. One is put together from what the tokenizer's own template writes around the
words of a conversation, and given only where it writes whole conversations again as the tokenizer does.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_kit.artifacts.adapter import Adapter
from adapters_kit.artifacts.chat import render as rendered

TEMPLATE = "chat_template.jinja"
Messages = list[tuple[str, str]]
_WORDS = ("SYSTEMWORDS", "USERWORDS", "ASSISTANTWORDS")


def vllm_command(path: Path, adapter: Adapter | None, ranks: tuple[int, ...]) -> str:
    """The command that serves an adapter beside its base, or a model folder.

    Args:
        path: the folder, which the command names absolutely.
        adapter: of that folder; None for a model.
        ranks: those that vLLM's option takes.
    """
    folder = path.resolve()
    if adapter is None:
        return shlex.join(["vllm", "serve", str(folder), "--served-model-name", folder.name])
    largest = max([adapter.config.r, *adapter.config.rank_pattern.values()])
    rank = next((one for one in ranks if one >= largest), largest)
    base = _base(adapter)
    name = folder.parent.name if folder.name == "adapter" else folder.name
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={folder}"]
    template = folder / TEMPLATE  # without it the base's own is taken
    return shlex.join([*words, *(["--chat-template", str(template)] if template.is_file() else [])])


def _base(adapter: Adapter) -> str:
    """How a command that is pasted anywhere names the base."""
    name = adapter.base or "BASE"
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def modelfile(path: Path, adapter: Adapter | None) -> str:
    """Ollama's Modelfile for a folder that was exported to model.gguf or adapter.gguf."""
    lines = ["FROM ./model.gguf"]
    if adapter is not None:
        base = _base(adapter)
        lines = [f"FROM {base}" if base.endswith(".gguf") else "FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    template, stop = _of_tokenizer(path)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif stop is not None:
        lines.append("# The chat template has no equal in Ollama's language that was proved here: write TEMPLATE.")
    return "\n".join([*lines, *([f'PARAMETER stop "{stop}"'] if stop else []), "PARAMETER temperature 0"])


def _of_tokenizer(path: Path) -> tuple[str | None, str | None]:
    """(Ollama's template, the token that ends an answer) of the tokenizer in a folder; None where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none there, or none that loads
        return None, None
    if not getattr(tokenizer, "chat_template", None):
        return None, None

    def render(messages: Messages, asked: bool) -> str:
        talk = [{"role": role, "content": words} for role, words in messages]
        text = rendered(tokenizer, talk, prompt=asked)
        start = tokenizer.bos_token or ""
        return (
            text.removeprefix(start) if start and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else text
        )

    return go_template(render), tokenizer.eos_token


def go_template(render: Callable[[Messages, bool], str]) -> str | None:
    """A chat template in Go's language that writes what `render` does; None if none was found that does.

    Args:
        render: (messages, whether an answer is asked for) -> text.
    """
    system, user, answer = _WORDS
    try:
        before, after_user = render([("user", user)], False).split(user)
        opening = render([("user", user)], True).removeprefix(before + user + after_user)
        whole = render([("user", user), ("assistant", answer)], False)
        after_answer = whole.removeprefix(before + user + after_user + opening + answer)
        led, rest = render([("system", system), ("user", user)], False).split(system)
        between = rest.removesuffix(user + after_user)
        again = render([("user", user), ("assistant", answer), ("user", "SECOND")], False)
        ahead = again.removeprefix(whole).removesuffix("SECOND" + after_user)
    except Exception:  # a template that refuses such a conversation, or writes its words twice
        return None
    if not (before.endswith(ahead) and between.endswith(ahead)):
        return None
    default = before.removesuffix(ahead)  # what stands first where no system message is given
    parts = {
        "default": default,
        "system": (led, between.removesuffix(ahead)),
        "user": (ahead, after_user),
        "assistant": (opening, after_answer),
    }
    texts = [part for value in parts.values() for part in ((value,) if isinstance(value, str) else value)]
    if any("{{" in text or '"""' in text for text in [*texts, opening]) or not _same(render, parts):
        return None
    turns = "".join(
        f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}{parts[role][0]}{{{{ .Content }}}}'
        f"{parts[role][1]}"
        for role in ("system", "user", "assistant")
    )
    first = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    return f"{first}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{opening}"


def _same(render: Callable[[Messages, bool], str], parts: dict[str, Any]) -> bool:
    """Whether the parts write conversations as `render` does, with and without a system message."""
    talk = [("user", "one two"), ("assistant", "Three."), ("user", "four"), ("assistant", "five"), ("user", "Six?")]
    try:
        for messages in (talk, talk[:1], [("system", "Be brief."), *talk]):
            text = "" if messages[0][0] == "system" else parts["default"]
            text += "".join(parts[role][0] + words + parts[role][1] for role, words in messages)
            if text + parts["assistant"][0] != render(messages, True):
                return False
    except Exception:  # the template refuses it
        return False
    return True
