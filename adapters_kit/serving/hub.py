"""push() and pull(): an adapter or a merged model to the model hub and back, with the card that people read there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import CONFIG, adapter_folder
from adapters_kit.artifacts.card import model_index, split, with_front
from adapters_kit.artifacts.hub_ping import endpoint, not_asked, reachable
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.leaks import ACCESS_TOKEN, find_leaks, scrub
from adapters_kit.artifacts.manifest import describe
from adapters_kit.artifacts.record_reader import read_record
from adapters_kit.artifacts.side_files import at_home, side_files
from adapters_kit.artifacts.staging import MANIFEST, file_sha256
from adapters_kit.errors import AdapterError, ShippingError
from adapters_kit.names import looks_like_path
from adapters_kit.recipe_text import parse_yaml
from adapters_kit.task_table import TASKS

# What only training needed, or tells of the machine it ran on.
_KEPT_BACK = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "samples.jsonl", ".")


@dataclass(frozen=True)
class Pushed:
    """What `push` sent.

    Attributes:
        repo: the hub id.
        url: its address.
        files: the names of what was sent, relative to the folder.
        left: the names of what stayed here: rows, what only training needed, links, folders that are no part of the
            model.
    """

    repo: str
    url: str
    files: list[str]
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        stayed = f" (not sent: {', '.join(self.left)})" if self.left else ""
        return f"{len(self.files)} files at {self.url}{stayed}"


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Send an adapter, or a merged model, to the hub. For a run folder its adapter is sent, with the run's scores.

    The card's metadata name the base model, the task, the data and the scores on the held-out rows, as the hub reads
    them (`model-index`). Paths of this machine are left out of it.

    Args:
        folder: a run, adapter or model folder.
        repo: the hub id, "owner/name"; made if it is not there.
        private: make it for its owner only.
        license: such as "apache-2.0"; the card says nothing without it.
        token: of the hub; by default the one of `hf auth login` or HF_TOKEN.

    Raises:
        ShippingError: nothing to send there, a name that is no hub id, a hub that does not answer or refuses.
    """
    from huggingface_hub import HfApi

    source = adapter_folder(Path(folder))
    foreign.check_either(source)
    if repo.count("/") != 1:
        raise ShippingError(f"{repo!r} is no hub id: it is OWNER/NAME.")
    _need_hub()
    with tempfile.TemporaryDirectory(prefix="adapters_kit-push-") as made:
        stage = Path(made)
        sent = dict(_sent(source))
        for name, path in sent.items():
            (stage / name).parent.mkdir(exist_ok=True)
            _link(path, stage / name)
        card = stage / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo.partition('/')[2]}\n"
        _replace(card, _with_metadata(text, source, license))
        replaced = {card.name, *_keep_to_ourselves(stage)}
        if secrets := [leak for leak in find_leaks(stage) if leak.kind == ACCESS_TOKEN]:
            raise ShippingError(f"{secrets[0]}. Whoever reads it can use it: take it out. Nothing was sent.")
        _tell_again(stage, replaced)
        api = HfApi(endpoint=endpoint(), token=token)
        with _in_words(repo, f"The hub did not take {repo}"):
            api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(repo_id=repo, folder_path=stage, commit_message=f"Upload {source.name}")
    here = (path.name for path in source.iterdir() if not path.name.startswith("."))
    left = [name for name in here if name not in {name.split("/")[0] for name in sent}]
    return Pushed(repo, f"{endpoint()}/{repo}", sorted({*sent, card.name}), sorted(left))


def _sent(source: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of what is sent: the files of the folder, and of its folders those that belong to a model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and at_home(path, source) and not path.name.startswith(_KEPT_BACK):
            yield path.name, path
    yield from ((name, path) for path, name in side_files(source) if "/" in name)


def pull(repo: str, out: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch an adapter or a model from the hub into a folder of your own.

    Args:
        repo: the hub id.
        out: the folder, which must not exist or be empty.
        revision: a branch, tag or commit.

    Raises:
        ShippingError: no such repository, or `out` holds something.
    """
    from huggingface_hub import snapshot_download

    from adapters_kit.artifacts.staging import staged

    out = Path(out)
    _need_hub()
    with _in_words(repo, f"The hub did not give {repo}", revision), staged(out, overwrite=False) as stage:
        snapshot_download(repo, revision=revision, local_dir=stage, token=token, endpoint=endpoint())
        shutil.rmtree(stage / ".cache", ignore_errors=True)
    return out


@contextmanager
def _in_words(repo: str, what: str, revision: str | None = None) -> Iterator[None]:
    """Whatever the hub or its library answers becomes a `ShippingError` that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except AdapterError:
        raise
    except errors.HFValidationError as error:
        raise ShippingError(f"{repo!r} is no hub id: {error}") from None
    except errors.LocalTokenNotFoundError as error:
        raise ShippingError(f"The hub needs to know who you are: hf auth login, or HF_TOKEN. ({error})") from error
    except errors.GatedRepoError as error:
        raise ShippingError(f"{what}: ask for access on its page, {endpoint()}/{repo}, then hf auth login.") from error
    except errors.RevisionNotFoundError as error:
        raise ShippingError(f"{what}: it has no branch, tag or commit {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ShippingError(
            f"{what}: there is no such repository, or it is private and the token is not of somebody who may see it "
            "(hf auth login, or HF_TOKEN)."
        ) from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            why = "no token was given, or the hub does not know it" if status == 401 else "the token may not do that"
            raise ShippingError(f"{what}: {why} (hf auth login, or HF_TOKEN).") from error
        raise ShippingError(f"{what}: {_told(error)}") from error


def _need_hub() -> None:
    if not_asked():
        raise ShippingError("HF_HUB_OFFLINE is set, so the hub is not asked. Unset it for this.")
    if not reachable():
        raise ShippingError(
            f"The hub ({endpoint()}) does not answer. Check the network; behind a mirror set HF_ENDPOINT."
        )


def _told(error: BaseException) -> str:
    """The first line of an error, or the whole of a fault in the card; of one without words its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" ({_told(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return (" ".join(lines) if isinstance(error, ValueError) else next(iter(lines), type(error).__name__)) + cause


def _link(source: Path, target: Path) -> None:
    """The file under another name without its bytes twice, where the disk allows."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _replace(path: Path, text: str) -> None:
    """Another text under the name; the file that was linked there stays as it is."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _keep_to_ourselves(stage: Path) -> set[str]:
    """Paths of this machine become names in what is sent; the files that were linked stay as they are.

    Returns:
        The names of the files that became others.
    """
    replaced = set()
    if (stage / CONFIG).is_file():
        raw = read_json(stage / CONFIG)
        named = _base(stage, raw)
        if named != raw.get("base_model_name_or_path"):
            _replace(stage / CONFIG, json.dumps(raw | {"base_model_name_or_path": named}, indent=2))
            replaced.add(CONFIG)
    for name in {leak.file for leak in find_leaks(stage) if leak.kind == "a path"}:
        _replace(stage / name, scrub((stage / name).read_text(encoding="utf-8", errors="replace")))
        replaced.add(name)
    return replaced


def _tell_again(stage: Path, replaced: set[str]) -> None:
    """The manifest with sizes and hashes of the files as they are sent."""
    if not (stage / MANIFEST).is_file():
        return
    told = read_json(stage / MANIFEST)
    if isinstance(files := told.get("files"), dict):
        for name in replaced & set(files):
            files[name] = {"bytes": (stage / name).stat().st_size, "sha256": file_sha256(stage / name)}
        _replace(stage / MANIFEST, json.dumps(told, indent=2) + "\n")


def _with_metadata(card: str, source: Path, license: str | None) -> str:
    """The card with the front matter that the hub reads, what it says already kept."""
    front, body = split(card)
    if license:
        front["license"] = license
    facts = _facts(source)
    recipe = facts.get("recipe", {})
    front.setdefault("base_model", facts.get("base"))
    if recipe.get("task") in TASKS:
        front.setdefault("pipeline_tag", TASKS[recipe["task"]].pipeline)
    data = recipe.get("data")
    data = data.get("train") if isinstance(data, Mapping) else data
    if isinstance(data, str) and "/" in data and not looks_like_path(data):
        front.setdefault("datasets", [data])
    if facts.get("scores"):
        task = TASKS[recipe["task"]].pipeline if recipe.get("task") in TASKS else "other"
        name = Path(str(data)).name
        front.setdefault("model-index", model_index(source.parent.name, task, name, facts["scores"]))
    return with_front(front, body)


def _facts(source: Path) -> dict[str, Any]:
    """What the folder, and the run around it, tell: base, recipe and scores."""
    found: dict[str, Any] = {}
    if (source / CONFIG).is_file():
        found["base"] = _base(source, read_json(source / CONFIG))
    if (source / "recipe.yaml").is_file():
        found["recipe"], _, _ = parse_yaml((source / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))
    metrics = source.parent / "metrics.json"
    if source.name == "adapter" and metrics.is_file():
        told = read_json(metrics)
        names = [name.removeprefix("base_") for name in told if name.startswith("base_")]
        found["scores"] = {name: told[name] for name in names if isinstance(told.get(name), int | float)}
    return found


def _base(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """How others know the base of an adapter: its hub id; a folder of this machine by its last name alone.

    `a/b` may be either. The record beside the adapter was written when the base was loaded, and knows.
    """
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    try:
        recorded = read_record(folder).get("base")
    except AdapterError:
        recorded = None
    return describe(recorded or base)
