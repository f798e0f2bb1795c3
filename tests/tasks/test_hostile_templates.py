"""Chat templates that would not end, or would take all memory: refused in one sentence; what real ones do is taken."""

import threading

import pytest

from adapters_kit.artifacts import chat
from adapters_kit.errors import DataError, ModelError
from adapters_kit.tasks.conversation import Conversation
from adapters_kit.tasks.template import ChatTemplate
from tests.support import small

TURNS = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]
ORDINARY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# Python can interrupt these.
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "more loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for m in messages %}{% endfor %}{% endfor %}"
    "{% endfor %}" + ORDINARY,
    "doubling": "{% set s = namespace(t='x') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
    "growing list": "{% set s = namespace(t=[1]) %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}",
}
# These it cannot.
REFUSED = {
    "power": "{{ 9**9**9 }}",
    "power of a name": "{% if messages|length > 90 %}{% set n = 9 %}{{ n ** n ** n }}{% endif %}",
    "repeated": "{{ 'x' * 10000000000 }}",
    "repeated by a name": "{% set n = 99999999999 %}{{ 'x' * n }}",
    "squares": "{% set s = namespace(n=9) %}{% for i in range(60) %}{% set s.n = s.n * s.n %}{% endfor %}",
    "width": "{{ '%99999999999d' % 1 }}",
    "width of format": "{{ '{:>99999999999}'.format(1) }}",
    "filter": "{{ 'x'|center(99999999999) }}",
    "long": "x" * 1_000_001,
}


@pytest.fixture
def tokenizer():
    return small.tokenizer(encoder=False)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    monkeypatch.setattr(chat, "BYTES", 1 << 28)


@pytest.mark.parametrize("case", [*ENDLESS, *REFUSED])
def test_a_template_that_would_not_end_is_refused(case, tokenizer):
    tokenizer.chat_template = (ENDLESS | REFUSED)[case]
    with pytest.raises(ModelError, match=r"The chat template of .*Write another into chat_template\.jinja"):
        ChatTemplate(tokenizer, "m").answer(Conversation(TURNS, None), 1)


def test_it_is_stopped_in_any_thread_and_the_next_is_rendered(tokenizer):
    found = []

    def ask(template):
        tokenizer.chat_template = template
        try:
            found.append(chat.render(tokenizer, TURNS))
        except ModelError as error:
            found.append(error)

    for template in (ENDLESS["loops"], ORDINARY):
        thread = threading.Thread(target=ask, args=[template])
        thread.start()
        thread.join()
    assert isinstance(found[0], ModelError) and found[1] == "<user>good<assistant>film"


@pytest.mark.parametrize(
    "template",
    [
        ORDINARY + "{{ '-' * 40 }}{{ loop_count * 2 if loop_count is defined }}",
        ORDINARY + "{{ '%05d' % 7 }}{{ '{:>20}'.format('a') }}{{ 1e6|int }}",
        "{% for i in range(5000) %}{% if i < messages|length %}{{ messages[i].content }}{% endif %}{% endfor %}",
    ],
)
def test_what_real_templates_do_is_taken(template, tokenizer):
    tokenizer.chat_template = template
    assert "good" in chat.render(tokenizer, TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ a.b.c }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_that_is_wrong_is_the_row_s_error(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"refuses the conversation in row 1"):
        ChatTemplate(tokenizer, "m").render(Conversation(TURNS, None), row=0)
