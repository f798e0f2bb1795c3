"""Weights in an adapter's folder that are not peft's: a reward's head, a projector, embeddings, a dense layer.

Tools put beside an adapter what they trained besides it, each under a name of its own. None of that is read here, and
an adapter without it computes something else: so it is refused, by name. What only training needs is left alone.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from adapters_kit.artifacts.checkpoint import open_file, read_header
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.errors import ShippingError
from adapters_kit.names import ADAPTER_CONFIG

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PEFTS = (WEIGHTS, PICKLE)
"""What peft writes an adapter's weights to: the first, in older versions the second."""

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".h5", ".msgpack", ".pdparams", ".lora")
# What a trainer needs to go on, and data: no part of what was trained.
_STATE = re.compile(
    r"""(.*optim|.*sched|rng_state|random_states|.*scaler|training_args|.*sampler|dl_state|recipe_state|trainer_state
        |zero_pp_rank|.*mp_rank|.*_states\.|.*imatrix|covariance|corda|eva_state|(train|test|eval|val)(_|\.|$)|data)""",
    re.VERBOSE | re.IGNORECASE,
)
# Folders beside the adapter's files with a checkpoint, a log or a conversion of their own.
_APART = re.compile(
    r"\.|(checkpoint|global_step|step|epoch|iter)[-_]?\d|pytorch_model_fsdp|optimizer|runs$|logs?$|wandb|onnx|openvino",
    re.IGNORECASE,
)
_WHOSE = (
    (
        r"value_head|v_head|critic",
        "the value head of a reward or PPO training, as LLaMA-Factory, ms-swift and TRL write it",
        "The tool that wrote it scores with it, and merges it (llamafactory-cli export).",
    ),
    (
        r"non_lora|mm_projector|projector|connector|vit\.|vision",
        "weights that LLaVA, or a tool like it, trained beside the adapter: a projector or a vision tower",
        "Merge it there (LLaVA: scripts/merge_lora_weights.py); what that writes loads here as a model.",
    ),
    (
        r"new_embed|.*embed",
        "embeddings that were trained beside the adapter",
        "peft keeps them in the adapter: trainable_token_indices, or modules_to_save=['embed_tokens', 'lm_head'].",
    ),
    (
        r"(pytorch_)?model_head|heads?\.|.*classifier|.*score|.*lm_head",
        "a head that was trained beside the adapter (AdapterHub and SetFit write such a file)",
        "peft keeps a head in the adapter: modules_to_save.",
    ),
    (
        r"\d+_\w+/",
        "a layer of sentence-transformers that comes after the model",
        "SentenceTransformer(folder) reads both.",
    ),
    (
        r"(pytorch_)?model[.-]|adapter_model-|consolidated|pytorch_model",
        "a whole model, or a part of one",
        "If that is the base, or what a merge wrote, it belongs in a folder of its own.",
    ),
)


def check_all_read(folder: Path, read: Collection[str], weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a folder with weights that are in none of the files that were read.

    Args:
        read: names of these files.
        weights: what they hold; a file that holds nothing else is a copy.

    Raises:
        ShippingError: names the file, what it holds, who writes such a file, and what to do.
    """
    unread: list[Path] = []
    for path in weight_files(folder):
        name = path.relative_to(folder).as_posix()
        if name in read or _is_copy(path, weights):
            continue
        if name in PEFTS:
            raise ShippingError(
                f"{folder} holds both {WEIGHTS} and {PICKLE}, with other weights in each: one of them is left over "
                "from an older save. Remove the stale one."
            )
        if _whose(name) is None and not _names_weights(path):
            warnings.warn(f"{path} is not read: nothing in it is named as weights are.", UserWarning, stacklevel=4)
            continue
        unread.append(path)
    if unread:
        names = [path.relative_to(folder).as_posix() for path in unread]
        what, way = _whose(names[0]) or (
            "weights of a kind that is not known here",
            "Load it with the code that wrote it.",
        )
        raise ShippingError(
            f"{folder} holds {names[0]} beside the adapter{_content(unread[0])}: {what}. It is not read here, and "
            f"without it the model would compute something else. {way} To have the adapter alone, move "
            f"{', '.join(names)} out of the folder."
        )


def _whose(name: str) -> tuple[str, str] | None:
    """What a file of that name holds, and the way to have it."""
    return next(((what, way) for start, what, way in _WHOSE if re.match(start, name, re.IGNORECASE)), None)


def weight_files(folder: Path) -> Iterator[Path]:
    """Files that hold tensors, here and one folder down, without what has a meaning of its own."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not _APART.match(path.name) and not (path / ADAPTER_CONFIG).is_file() and not _is_model(path):
                yield from (inner for inner in sorted(path.iterdir()) if _holds_weights(inner))
        elif _holds_weights(path):
            yield path


def other_adapters(folder: Path) -> list[str]:
    """What to tell of a folder that holds, beside its own adapter, others under names of their own: only its own is
    read, as peft does."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    named = [name for name in inner if not _APART.match(name)]
    if not named:
        return []
    names = ", ".join(map(repr, named))
    return [f"{folder} also holds {names}, each an adapter of its own, which was not read: name its folder to have it."]


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model of its own: merged, or the base."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except ShippingError:
        return False


def _holds_weights(path: Path) -> bool:
    if path.name in ("model_head.pkl", "model_head.joblib"):  # SetFit's logistic regression
        return True
    if path.suffix not in _SUFFIXES or _STATE.match(path.name) or not path.is_file() or not path.stat().st_size:
        return False
    if path.suffix in (".safetensors", ".npz") or not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as file:  # torch's own format: what is no tensor lies in data.pkl
        return any("/data/" in one.filename for one in file.infolist())


def tensor_names(path: Path) -> list[str]:
    """Names of a file's tensors; none where it takes more than reading to know.

    Raises:
        ShippingError: a damaged safetensors file.
    """
    if path.suffix == ".safetensors":
        return list(read_header(path)[0])
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    return list(_unpickled(path, "meta"))


def _unpickled(path: Path, device: str) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        return {}
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError):
        return {}
    tensors = isinstance(found, dict) and all(isinstance(one, torch.Tensor) for one in found.values())
    return {str(name): one for name, one in found.items()} if tensors else {}


def _is_copy(path: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether every tensor of a file is one that was read."""
    names = [] if path.suffix == ".npz" else tensor_names(path)
    if not names:
        return False
    if not weights.keys() >= set(names):
        return len(names) == len(weights) and path.suffix == ".pt" and _is_reordered(_unpickled(path, "cpu"), weights)
    if path.suffix == ".safetensors":
        with open_file(path) as file:
            return all(torch.equal(file.read(name), weights[name]) for name in names)
    return all(torch.equal(tensor, weights[name]) for name, tensor in _unpickled(path, "cpu").items())


def _is_reordered(tensors: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file holds the numbers that were read under other names and in another order: torchtune writes its own
    form, whose heads lie in another order, beside peft's."""
    both = [torch.cat([one.flatten().float() for one in table.values()]) for table in (tensors, weights)]
    return both[0].shape == both[1].shape and torch.equal(both[0].sort().values, both[1].sort().values)


def _names_weights(path: Path) -> bool:
    """Whether a file's tensors are named as a model's are; yes for a format that is not opened here."""
    try:
        names = tensor_names(path)
    except ShippingError:
        return True
    opened = path.suffix == ".npz" or zipfile.is_zipfile(path) or path.suffix == ".safetensors"
    return not opened or any(re.search(r"weight|bias|lora_|embed|head", name) for name in names)


def _content(path: Path) -> str:
    try:
        names = tensor_names(path)
    except ShippingError:
        return ""
    return f" ({len(names)} tensor{'s' * (len(names) > 1)}, such as {names[0]})" if names else ""
