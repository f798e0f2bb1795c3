"""push() and pull(): an adapter or a merged model to the model hub and back, with the card that people read there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapters_kit.artifacts import foreign
from adapters_kit.artifacts.adapter import CONFIG, adapter_folder
from adapters_kit.artifacts.card import split
from adapters_kit.artifacts.hub_ping import endpoint, not_asked, reachable
from adapters_kit.artifacts.json_file import read_json
from adapters_kit.artifacts.leaks import ACCESS_TOKEN, find_leaks, scrub
from adapters_kit.artifacts.side_files import at_home
from adapters_kit.errors import ShippingError
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
        files: the names of what was sent.
    """

    repo: str
    url: str
    files: list[str]

    def __str__(self) -> str:
        return f"{len(self.files)} files at {self.url}"


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    source = adapter_folder(Path(folder))
    foreign.check_either(source)
    if repo.count("/") != 1:
        raise ShippingError(f"{repo!r} is no hub id: it is OWNER/NAME.")
    _need_hub()
    with tempfile.TemporaryDirectory(prefix="adapters_kit-push-") as made:
        stage = Path(made)
        for path in sorted(source.iterdir()):
            if path.is_file() and at_home(path, source) and not path.name.startswith(_KEPT_BACK):
                _link(path, stage / path.name)
        card = stage / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo.partition('/')[2]}\n"
        card.unlink(missing_ok=True)
        card.write_text(_with_metadata(text, source, license), encoding="utf-8")
        _keep_to_ourselves(stage)
        if secrets := [leak for leak in find_leaks(stage) if leak.kind == ACCESS_TOKEN]:
            raise ShippingError(f"{secrets[0]}. Whoever reads it can use it: take it out. Nothing was sent.")
        files = sorted(path.name for path in stage.iterdir())
        api = HfApi(endpoint=endpoint(), token=token)
        try:
            api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(repo_id=repo, folder_path=stage, commit_message=f"Upload {source.name}")
        except HFValidationError as error:
            raise ShippingError(f"{repo!r} is no hub id: {error}") from None
        except LocalTokenNotFoundError as error:
            raise ShippingError(f"The hub needs to know who you are: hf auth login, or HF_TOKEN. ({error})") from error
        except (HfHubHTTPError, OSError) as error:
            raise ShippingError(f"The hub did not take {repo}: {_first_line(error)}") from error
    return Pushed(repo, f"{endpoint()}/{repo}", files)


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from adapters_kit.artifacts.staging import staged

    out = Path(out)
    _need_hub()
    try:
        with staged(out, overwrite=False) as stage:
            snapshot_download(repo, revision=revision, local_dir=stage, token=token, endpoint=endpoint())
            shutil.rmtree(stage / ".cache", ignore_errors=True)
    except HFValidationError as error:
        raise ShippingError(f"{repo!r} is no hub id: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise ShippingError(f"The hub did not give {repo}: {_first_line(error)}") from error
    return out


def _need_hub() -> None:
    if not_asked():
        raise ShippingError("HF_HUB_OFFLINE is set, so the hub is not asked. Unset it for this.")
    if not reachable():
        raise ShippingError(
            f"The hub ({endpoint()}) does not answer. Check the network; behind a mirror set HF_ENDPOINT."
        )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _link(source: Path, target: Path) -> None:
    """The file under another name without its bytes twice, where the disk allows."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _keep_to_ourselves(stage: Path) -> None:
    """Paths of this machine become names in what is sent; the files that were linked stay as they are."""
    for name in {leak.file for leak in find_leaks(stage) if leak.kind == "a path"}:
        path = stage / name
        text = path.read_text(encoding="utf-8", errors="replace")
        if name == CONFIG:
            raw = read_json(path)
            text = json.dumps(raw | {"base_model_name_or_path": _public(raw.get("base_model_name_or_path"))}, indent=2)
        path.unlink()
        path.write_text(scrub(text), encoding="utf-8")


def _with_metadata(card: str, source: Path, license: str | None) -> str:
    """The card with the front matter that the hub reads, what it says already kept."""
    front, body = split(card)
    if license:
        front["license"] = license
    facts = _facts(source)
    recipe = facts.get("recipe", {})
    front.setdefault("base_model", _public(facts.get("base")))
    if recipe.get("task") in TASKS:
        front.setdefault("pipeline_tag", TASKS[recipe["task"]].pipeline)
    data = recipe.get("data")
    data = data.get("train") if isinstance(data, Mapping) else data
    if isinstance(data, str) and _is_hub_id(data):
        front.setdefault("datasets", [data])
    if facts.get("scores"):
        front["model-index"] = [_index(source, recipe, facts["scores"], data)]
    front = {key: value for key, value in front.items() if value is not None}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}"


def _facts(source: Path) -> dict[str, Any]:
    """What the folder, and the run around it, tell: base, recipe and scores."""
    found: dict[str, Any] = {}
    if (source / CONFIG).is_file():
        found["base"] = read_json(source / CONFIG).get("base_model_name_or_path")
    if (source / "recipe.yaml").is_file():
        found["recipe"], _, _ = parse_yaml((source / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))
    metrics = source.parent / "metrics.json"
    if source.name == "adapter" and metrics.is_file():
        told = read_json(metrics)
        names = [name.removeprefix("base_") for name in told if name.startswith("base_")]
        found["scores"] = {name: told[name] for name in names if isinstance(told.get(name), int | float)}
    return found


def _index(source: Path, recipe: Mapping[str, Any], scores: Mapping[str, float], data: Any) -> dict[str, Any]:
    task = TASKS[recipe["task"]].pipeline if recipe.get("task") in TASKS else "other"
    name = data if isinstance(data, str) and _is_hub_id(data) else Path(str(data)).name
    return {
        "name": source.parent.name,
        "results": [
            {
                "task": {"type": task},
                "dataset": {"name": f"held-out rows of {name}", "type": name},
                "metrics": [{"type": key, "value": round(float(value), 6)} for key, value in scores.items()],
            }
        ],
    }


def _is_hub_id(name: str) -> bool:
    return (
        not Path(name).exists() and name.count("/") <= 1 and not Path(name).suffix and not name.startswith((".", "/"))
    )


def _public(base: Any) -> str | None:
    """A base's hub id; a folder of this machine is named by its last part alone."""
    if not isinstance(base, str) or not base:
        return None
    return base if _is_hub_id(base) else Path(base).name
