"""The tasks, a row each: what everything outside `tasks/` needs to know about one. Floor 0, no torch.

To add a task, write its class (a file in `tasks/`) and its row here; nothing else lists tasks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one task is to the rest of the package.

    Attributes:
        home: where its class is, "module:Class", imported when the task is first used.
        roles: the roles that its data columns can play; `data.columns` in a recipe names the column for each.
        auto_class: the class of transformers that puts the fitting head on a body.
        second_class: the class for bodies of another kind, where a task has two (speech that is spelled, not written).
        task_type: peft's name for the task (a member of `peft.TaskType`); None where peft has none.
        pipeline: the hub's name for the task, the `pipeline_tag` of a model card.
        own_head: whether the head belongs to the user's task, so that it is trained and saved with an adapter.
        labelled: whether the user's classes are the head's outputs, so that `labels` name them.
        keys: dotted keys of a recipe that this task has and others have not.
        beside_tokens: features that hold one value a token, where a training row may lose tokens or change their order
            (`data.augment`); None where every token has its place.
        example: a small model of the hub to begin with; any other of the kind will do. None: the user names one.
    """

    home: str
    roles: tuple[str, ...]
    auto_class: str
    task_type: str | None
    pipeline: str
    own_head: bool = False
    labelled: bool = False
    keys: tuple[str, ...] = ()
    beside_tokens: tuple[str, ...] | None = None
    example: str | None = None
    second_class: str | None = None

    @property
    def auto_classes(self) -> tuple[str, ...]:
        """Both classes of transformers, or the one."""
        return (self.auto_class,) if self.second_class is None else (self.auto_class, self.second_class)


TASKS: dict[str, Row] = {
    "causal-lm": Row(
        "adapters_kit.tasks.causal_lm:CausalLM",
        roles=("text", "prompt", "completion", "messages", "input", "history", "system", "tools"),
        auto_class="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        pipeline="text-generation",
        keys=("training.packing", "objective"),
        beside_tokens=("labels",),
        example="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "text-classification": Row(
        "adapters_kit.tasks.text_classification:TextClassification",
        roles=("text", "text_pair", "label"),
        auto_class="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        pipeline="text-classification",
        own_head=True,
        labelled=True,
        keys=("problem",),
        beside_tokens=("token_type_ids",),
        example="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "token-classification": Row(
        "adapters_kit.tasks.token_classification:TokenClassification",
        roles=("tokens", "tags", "text", "spans"),
        auto_class="AutoModelForTokenClassification",
        task_type="TOKEN_CLS",
        pipeline="token-classification",
        own_head=True,
        labelled=True,
        example="distilbert/distilbert-base-cased",
    ),
    "question-answering": Row(
        "adapters_kit.tasks.question_answering:QuestionAnswering",
        roles=("question", "context", "answers"),
        auto_class="AutoModelForQuestionAnswering",
        task_type="QUESTION_ANS",
        pipeline="question-answering",
        own_head=True,
        keys=("unanswerable", "no_answer_threshold"),
        example="distilbert/distilbert-base-uncased",
    ),
    "seq2seq": Row(
        "adapters_kit.tasks.seq2seq:Seq2Seq",
        roles=("source", "target"),
        auto_class="AutoModelForSeq2SeqLM",
        task_type="SEQ_2_SEQ_LM",
        pipeline="text2text-generation",
        keys=("data.source_lang", "data.target_lang", "data.source_prefix"),
        beside_tokens=(),
        example="google/flan-t5-small",
    ),
    "masked-lm": Row(
        "adapters_kit.tasks.masked_lm:MaskedLM",
        roles=("text",),
        auto_class="AutoModelForMaskedLM",
        task_type=None,
        pipeline="fill-mask",
        example="distilbert/distilbert-base-uncased",
    ),
    "image-classification": Row(
        "adapters_kit.tasks.image_classification:ImageClassification",
        roles=("image", "label"),
        auto_class="AutoModelForImageClassification",
        task_type=None,
        pipeline="image-classification",
        own_head=True,
        labelled=True,
        example="google/vit-base-patch16-224-in21k",
    ),
    "object-detection": Row(
        "adapters_kit.tasks.object_detection:ObjectDetection",
        roles=("image", "objects", "boxes", "classes", "width", "height"),
        auto_class="AutoModelForObjectDetection",
        task_type=None,
        pipeline="object-detection",
        own_head=True,
        labelled=True,
        keys=("data.box_format", "data.min_score"),
        example="facebook/detr-resnet-50",
    ),
    "audio-classification": Row(
        "adapters_kit.tasks.audio_classification:AudioClassification",
        roles=("audio", "label", "sampling_rate"),
        auto_class="AutoModelForAudioClassification",
        task_type=None,
        pipeline="audio-classification",
        own_head=True,
        labelled=True,
        keys=("data.max_seconds",),
        example="facebook/wav2vec2-base",
    ),
    "speech-recognition": Row(
        "adapters_kit.tasks.speech_recognition:SpeechRecognition",
        roles=("audio", "transcript", "sampling_rate"),
        auto_class="AutoModelForSpeechSeq2Seq",
        task_type=None,
        pipeline="automatic-speech-recognition",
        keys=("data.max_seconds", "data.language", "data.speech_task"),
        example="openai/whisper-tiny",
        second_class="AutoModelForCTC",
    ),
    "sentence-embedding": Row(
        "adapters_kit.tasks.sentence_embedding:SentenceEmbedding",
        roles=("anchor", "positive", "negative", "score"),
        auto_class="AutoModel",
        task_type=None,
        pipeline="sentence-similarity",
        example="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "reranking": Row(
        "adapters_kit.tasks.reranking:Reranking",
        roles=("query", "document", "label", "positive", "negative"),
        auto_class="AutoModelForSequenceClassification",
        task_type="SEQ_CLS",
        pipeline="text-ranking",
        own_head=True,
        labelled=True,
        example="cross-encoder/ms-marco-MiniLM-L6-v2",
    ),
    "next-sentence": Row(
        "adapters_kit.tasks.next_sentence:NextSentence",
        roles=("text",),
        auto_class="AutoModelForNextSentencePrediction",
        task_type=None,
        pipeline="text-classification",
        own_head=True,
        example="google-bert/bert-base-uncased",
    ),
    "permutation-lm": Row(
        "adapters_kit.tasks.permutation_lm:PermutationLM",
        roles=("text",),
        auto_class="AutoModelForCausalLM",
        task_type="CAUSAL_LM",
        pipeline="text-generation",
        example="xlnet/xlnet-base-cased",
    ),
}


@dataclass(frozen=True)
class Objective:
    """What causal-lm may learn by, other than the text of an answer (`objective` in a recipe).

    Attributes:
        home: where its class is, as for a task.
        roles: the roles that its data columns can play.
        keys: keys of the recipe's `objective` that this one has; all others are refused.
        needs: keys of those that have to be given.
        head: the task whose model class it trains.
        package: what has to be installed, and the extra that brings it; None for nothing.
    """

    home: str
    roles: tuple[str, ...]
    keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    head: str = "causal-lm"
    package: str | None = "trl"


_ASKED = ("prompt", "input", "history", "system", "tools")
_PAIRS = (*_ASKED, "chosen", "rejected", "score_chosen", "score_rejected")
OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(
        "adapters_kit.tasks.objectives.preference:DPO",
        roles=_PAIRS,
        keys=("beta", "loss_type", "label_smoothing"),
    ),
    "orpo": Objective("adapters_kit.tasks.objectives.orpo:ORPO", roles=_PAIRS, keys=("beta",)),
    "kto": Objective(
        "adapters_kit.tasks.objectives.kto:KTO",
        roles=(*_PAIRS, "completion", "label"),
        keys=("beta", "desirable_weight", "undesirable_weight"),
    ),
    "reward": Objective(
        "adapters_kit.tasks.objectives.reward:Reward",
        roles=(*_PAIRS, "completion", "messages"),
        keys=("center",),
        head="text-classification",
    ),
    "distill": Objective(
        "adapters_kit.tasks.objectives.distill:Distill",
        roles=("text", "prompt", "completion", "messages", "input", "history", "system", "tools"),
        keys=("teacher", "temperature"),
        package=None,
    ),
}


def home_of(task: str, objective: str | None = None) -> str:
    """Where the class is that teaches a task by an objective; None is the task's own."""
    return TASKS[task].home if objective is None else OBJECTIVES[objective].home


def roles_of(task: str, objective: str | None = None) -> tuple[str, ...]:
    """The roles that data columns can play."""
    return TASKS[task].roles if objective is None else OBJECTIVES[objective].roles


# Heads that `wrap` trains with an adapter too: of models that come from the user's own code, and the letters of CTC.
OTHER_HEADS = ("AutoModelForMultipleChoice", "AutoModelForCTC")


def labelled() -> list[str]:
    """The tasks whose classes the user names."""
    return [name for name, row in TASKS.items() if row.labelled]


def tasks_with(key: str) -> list[str]:
    """The tasks that have a dotted key of the recipe to themselves; empty for keys of every task."""
    return [name for name, row in TASKS.items() if key in row.keys]
