"""One file a task: the columns it needs, encoding, collating, predicting, scoring."""

from adapters_kit.errors import UnknownNameError, did_you_mean
from adapters_kit.registry import load_attribute
from adapters_kit.tasks.base import Task

_HOME = {
    "causal-lm": "adapters_kit.tasks.causal_lm:CausalLM",
    "text-classification": "adapters_kit.tasks.text_classification:TextClassification",
    "token-classification": "adapters_kit.tasks.token_classification:TokenClassification",
    "question-answering": "adapters_kit.tasks.question_answering:QuestionAnswering",
    "seq2seq": "adapters_kit.tasks.seq2seq:Seq2Seq",
    "masked-lm": "adapters_kit.tasks.masked_lm:MaskedLM",
    "image-classification": "adapters_kit.tasks.image_classification:ImageClassification",
}


def get(name: str) -> type[Task]:
    """The class of the task called `name`."""
    if name not in _HOME:
        raise UnknownNameError(f"Unknown task {name!r}. {did_you_mean(name, _HOME)}")
    return load_attribute(_HOME[name])
