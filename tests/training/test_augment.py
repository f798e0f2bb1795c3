"""Training rows change each time they are seen, by the seed; held-out rows, answers and special tokens never do."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adapters_kit as ak
from adapters_kit.errors import MissingPackageError, RecipeError
from adapters_kit.recipe_sections import AugmentSpec
from adapters_kit.training.augment import Augment
from adapters_kit.training.resolve import resolve
from tests.support import small, stopping, tiny


class Told:
    """A task as far as this needs one."""

    def __init__(self, name="text-classification", **special):
        self.recipe = types.SimpleNamespace(model="m", task=name)
        known = {"all_special_ids": [0, 1, 2], "mask_token_id": 4, "unk_token_id": 3, "eos_token_id": 2, **special}
        self.processor = types.SimpleNamespace(**known)


def applied(features, task=None, **spec):
    return Augment(AugmentSpec(**spec), task or Told(), torch.nn.Linear(1, 1))(features)


def row(length, **more):
    ids = np.array([1, *range(10, 10 + length), 2], dtype=np.uint16)
    return {"row": 0, "input_ids": ids, "token_type_ids": np.arange(length + 2), **more}


def test_deletion_takes_a_part_and_never_all_or_what_is_special():
    torch.manual_seed(0)
    made = [applied([row(40)], token_deletion=0.25)[0] for _ in range(200)]
    left = np.mean([len(one["input_ids"]) - 2 for one in made]) / 40
    assert left == pytest.approx(0.75, abs=0.02)
    for one in made:
        assert one["input_ids"][0] == 1 and one["input_ids"][-1] == 2
        assert (one["input_ids"][1:-1] == one["token_type_ids"][1:-1] + 9).all()  # what stands beside goes with it
    assert len({len(one["input_ids"]) for one in made}) > 3
    short = [applied([row(1)], token_deletion=0.99)[0]["input_ids"].tolist() for _ in range(20)]
    assert all(one == [1, 10, 2] for one in short)


def test_swaps_keep_every_token():
    torch.manual_seed(0)
    given = row(30)
    made = applied([given], token_swap=0.5)[0]["input_ids"]
    assert sorted(made) == sorted(given["input_ids"]) and (made != given["input_ids"]).any()
    assert (np.abs(np.argsort(made[1:-1]) - np.arange(30)) <= 1).all()
    assert given["input_ids"].tolist() == row(30)["input_ids"].tolist()  # the row itself stays


def test_dropout_hides_behind_what_the_tokenizer_has():
    torch.manual_seed(0)
    made = np.concatenate([applied([row(40)], token_dropout=0.2)[0]["input_ids"] for _ in range(100)])
    assert (made == 4).mean() == pytest.approx(0.2 * 40 / 42, abs=0.02)
    assert 3 in applied([row(40)], Told(mask_token_id=None), token_dropout=0.5)[0]["input_ids"]
    with pytest.raises(RecipeError, match=r"neither a mask token nor one for the unknown.*token_deletion"):
        applied([row(4)], Told(mask_token_id=None, unk_token_id=2), token_dropout=0.5)


@pytest.mark.parametrize("spec", [{"token_deletion": 0.6}, {"token_swap": 0.9}, {"token_dropout": 0.6}])
def test_what_is_learned_stays_whole(spec):
    """Of a conversation the prompt changes; the answer's tokens, their order and their labels do not."""
    torch.manual_seed(1)
    labels = np.array([-100] * 11 + list(range(20, 31)))
    given = {"row": 0, "input_ids": np.array([1, *range(10, 31)]), "labels": labels}
    made = applied([given], Told("causal-lm"), **spec)[0]
    learned = made["labels"] != -100
    assert made["input_ids"][learned].tolist() == labels[labels != -100].tolist() == made["labels"][learned].tolist()
    assert made["input_ids"].tolist() != given["input_ids"].tolist()
    # Classes of a multi-label row are as many as its tokens by chance: they are no labels of tokens.
    several = np.array([1.0, 0, 0, 1, 1, 0])
    assert applied([row(4, labels=several)], Told(), **spec)[0]["labels"] is several


TEACHER = {"name": "distill", "teacher": "a"}


def recipe(tmp_path, augment, **more):
    data = {"train": str(small.write_jsonl(tmp_path / "rows.jsonl", small.sentiment(40))), "test_size": 8}
    given = {
        "model": str(small.model("bert")),
        "task": "text-classification",
        "data": {**data, "augment": augment},
        "method": {"name": "lora", "r": 4},
        "training": {"max_steps": 6, "batch_size": 8, "samples": 0, "learning_rate": 1e-2, "save_every": 2},
    }
    return {**given, **more}


@pytest.mark.slow
def test_a_resumed_run_sees_what_the_whole_run_saw(tmp_path):
    given = recipe(tmp_path, {"token_deletion": 0.3, "token_dropout": 0.1, "neftune": 5})
    whole = ak.train(given, tmp_path / "whole", quiet=True)
    with stopping.killed_at_step(4), pytest.raises(stopping.Killed):
        ak.train(given, tmp_path / "stopped", quiet=True)
    again = ak.train(given, tmp_path / "stopped", resume=True, quiet=True)
    plain = ak.train({**given, "data": {**given["data"], "augment": None}}, tmp_path / "plain", quiet=True)
    one, two, three = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again, plain))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(tensor, three[name], atol=1e-4) for name, tensor in one.items())
    # Scores are of rows as they are, without noise.
    assert whole.metrics["base_loss"] == pytest.approx(plain.metrics["base_loss"])
    assert ak.evaluate(whole)["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


def test_what_does_not_go_together_is_refused(tmp_path):
    def refused(told, augment, kind=RecipeError, **more):
        with pytest.raises(kind, match=told):
            resolve(ak.Recipe(**recipe(tmp_path, augment, **more)))

    refused("token-classification hang on the place of every token", {"token_swap": 0.1}, task="token-classification")
    refused("masked-lm hang on the place", {"token_deletion": 0.1}, task="masked-lm")
    refused("causal-lm by distill hang on", {"token_swap": 0.1}, task="causal-lm", objective=TEACHER)
    refused("set packing: false", {"token_deletion": 0.1}, task="causal-lm", training={"packing": True})
    refused("it is for image-classification", {"images": ["RandomHorizontalFlip"]})
    refused("it is for recordings", {"spec_augment": 0.1})
    refused("noise on the embeddings of tokens", {"neftune": 5}, task="image-classification")
    for bad, told in (
        ({"token_swap": 1.0}, "less than 1"),
        ({"neftune": 0}, "greater than 0"),
        ({"tokens": 1}, "no key"),
    ):
        with pytest.raises(RecipeError, match=told):
            ak.Recipe(**recipe(tmp_path, bad))
    with pytest.raises(RecipeError, match="one name with its options"):
        ak.Recipe(**recipe(tmp_path, {"images": [{"A": {}, "B": {}}]}))


def test_pictures_go_through_what_is_named(monkeypatch):
    """By a stand-in: torchvision's wheels do not load on every machine."""
    from PIL import Image

    class Flip:
        def __init__(self, p=0.5):
            self.p = p

        def __call__(self, picture):
            return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.p else picture

    class Compose:
        def __init__(self, parts):
            self.parts = parts

        def __call__(self, picture):
            for part in self.parts:
                picture = part(picture)
            return picture

    v2 = types.ModuleType("torchvision.transforms.v2")
    v2.RandomHorizontalFlip, v2.Compose = Flip, Compose
    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    package.transforms, transforms.v2 = transforms, v2
    for name, module in (("", package), (".transforms", transforms), (".transforms.v2", v2)):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", module)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    (made,) = applied([{"row": 0, "image": picture}], images=[{"RandomHorizontalFlip": {"p": 1}}])
    assert np.asarray(made["image"]).tolist() == np.asarray(picture)[:, ::-1].tolist()
    with pytest.raises(RecipeError, match=r"no 'RandomHorizontalFlop'\. Did you mean RandomHorizontalFlip"):
        applied([], images=["RandomHorizontalFlop"])
    with pytest.raises(RecipeError, match=r"cannot be made with \{'q': 1\}"):
        applied([], images=[{"RandomHorizontalFlip": {"q": 1}}])
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.transforms")
    monkeypatch.delitem(sys.modules, "torchvision.transforms.v2")
    with pytest.raises(MissingPackageError, match="needs torchvision"):
        applied([], images=["RandomHorizontalFlip"])


def test_spectra_are_masked_by_the_model_itself():
    model = tiny.build("whisper")
    Augment(AugmentSpec(spec_augment=0.3), Told("speech-recognition"), model)
    assert model.config.apply_spec_augment and model.config.mask_time_prob == 0.3
    Augment(AugmentSpec(spec_augment=0), Told("speech-recognition"), model)
    assert not model.config.apply_spec_augment
    with pytest.raises(RecipeError, match="has no SpecAugment"):
        Augment(AugmentSpec(spec_augment=0.3), Told(), tiny.build("bert"))
