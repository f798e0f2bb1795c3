"""What is shipped is what was trained: every road of training × every kind of base × every kind of adapter.

A cell trains, saves, reloads the adapter and merges it; reloaded and merged model answer as the trained one did, within
what the dtype rounds, or `merge` refuses in words. Each cell prints its figures (`pytest -rP`).
"""

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import adapters_kit as ak
from adapters_kit.artifacts.proof import read_proof, runner
from adapters_kit.artifacts.record_reader import read_record
from tests.support import quantized, small, tiny

pytest.importorskip("gguf")
from tests.support import gguf_files

BASES = [None, "nf4", "int8", "keep"]
TOKENS = [5, 20, 60]
METHODS = {
    "lora": ("lora", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("dora", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "houlsby": ("houlsby", {}),
    "lora+tokens": ("lora", {"r": 4, "target_modules": ["down_proj"], "trainable_token_indices": TOKENS}),
}
STEPS = {"learning_rate": 0.02, "per_device_train_batch_size": 4, "max_steps": 2, "report_to": "none"}
STEPS |= {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
# Of the largest logit: float32 sums in another order; and 16-bit weights or factors, rounded a few times.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind of base -> the folder or file that it is loaded from."""
    folder = small.model("llama", chat=True)
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    gguf_files.write("llama", file, "Q8_0")
    return {None: folder, "nf4": folder, "int8": folder, "keep": file}


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(3, tiny.VOCAB, (8, 10), generator=generator)
    made[:, :3] = torch.tensor(TOKENS)
    return made.tolist()


def by_train(source, quantize, name, options, out):
    data = [{"prompt": f"say {row['name']} ?", "completion": row["answer"]} for row in small.questions(12)]
    recipe = {
        "model": str(source),
        "quantize": quantize,
        "task": "causal-lm",
        "method": {"name": name, **options},
        "max_new_tokens": 1,
        "data": {"train": str(small.write_jsonl(out / "rows.jsonl", data)), "test_size": 4},
        "training": {"epochs": 1, "learning_rate": 0.02, "batch_size": 4}
        | ({} if quantize == "int8" else {"precision": "fp32"}),
    }
    return ak.train(recipe, out / "run", quiet=True).adapter, None


def wrapped(source, quantize, name, options):
    torch.manual_seed(0)
    model = ak.wrap(ak.load(source, quantize=quantize, dtype="float32"), name, **options)
    if name != "houlsby":  # LoRA's B is zero at first, and two steps move it little
        quantized.fill(model)
    return model


def by_trainer(source, quantize, name, options, out):
    model = wrapped(source, quantize, name, options)
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows()])
    arguments = transformers.TrainingArguments(output_dir=str(out / "t"), **STEPS)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return out / "adapter", model


def by_sft_trainer(source, quantize, name, options, out):
    trl = pytest.importorskip("trl")
    model = wrapped(source, quantize, name, options)
    data = Dataset.from_list([{"input_ids": ids} for ids in rows()])
    arguments = trl.SFTConfig(output_dir=str(out / "t"), bf16=False, max_length=32, **STEPS)
    tokenizer = small.tokenizer(encoder=False, chat=True)
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return out / "adapter", trainer.model


def by_plain_loop(source, quantize, name, options, out):
    model = wrapped(source, quantize, name, options).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for ids in list(DataLoader(torch.tensor(rows()), batch_size=4)):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out / "adapter")
    return out / "adapter", model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor(rows()[:4])).logits.float()


def distance(one, other) -> float:
    return (one - other).abs().max().item() / max(1.0, other.abs().max().item())


def saved_as(adapter) -> set[str]:
    return {
        str(value.dtype).removeprefix("torch.") for value in load_file(adapter / "adapter_model.safetensors").values()
    }


ROADS = {"ak.train": by_train, "Trainer": by_trainer, "SFTTrainer": by_sft_trainer, "plain loop": by_plain_loop}


@torch.no_grad()
def told_apart(folder, model) -> float:
    """How far a model is from what training wrote into proof.json of the model that it held, in nats of the largest
    log-probability. The same rows are asked in one batch, as training asked them: 8-bit linears round their inputs, in
    steps that one row alone would not take at the same places."""
    proof, tokenizer = read_proof(folder), ak.load_processor(folder)

    def ids(tokens):
        words = [token.strip() for token in tokens]
        found = tokenizer.convert_tokens_to_ids(words)
        assert tokenizer.convert_ids_to_tokens(found) == words
        return found

    run, steps = runner(model.eval()), len(proof.prompts[0].positions)
    asked = [prompt.ids for prompt in proof.prompts]
    for _ in range(steps - 1):
        asked = [[*row, int(v[-1].argmax())] for row, v in zip(asked, run(asked, [1] * len(asked)), strict=True)]
    found = run(asked, [steps] * len(asked))
    pairs = []
    for prompt, values in zip(proof.prompts, found, strict=True):
        for position, row in zip(prompt.positions, values, strict=True):
            pairs.append((row[ids(position.tuned)], torch.tensor(list(position.tuned.values()))))
    here, there = map(torch.cat, zip(*pairs, strict=True))
    return distance(here, there)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantize", BASES, ids=["fp32", "nf4", "int8", "gguf"])
@pytest.mark.parametrize("road", ROADS)
def test_what_is_shipped_is_what_was_trained(road, quantize, method, sources, tmp_path, capsys):
    name, options = METHODS[method]
    source = sources[quantize]
    adapter, trained = ROADS[road](source, quantize, name, options, tmp_path)
    told = read_record(adapter)
    assert told["tensors"] and told["base"]
    assert (told["quantize"] or {}).get("type") == (quantize if quantize in ("nf4", "int8") else None)
    bare = ak.load(source, quantize=quantize, dtype=told["dtype"])
    base = logits(bare)
    again = ak.wrap(ak.load(source, quantize=quantize, dtype=told["dtype"]), adapter)
    answer = logits(again)
    moved = distance(answer, base)
    assert moved > 1e-3, "the training changed nothing that could be lost"
    figures = [f"moved {moved:.1e}"]
    # TRL casts what is trained on a quantized base to bfloat16.
    bound = BOUNDS["bfloat16" if "bfloat16" in (told["dtype"], *saved_as(adapter)) else "float32"]
    reloaded = told_apart(adapter, again) if trained is None else distance(answer, logits(trained))
    figures.append(f"reloaded {reloaded:.1e}")
    assert reloaded < bound
    if method == "houlsby":
        with pytest.raises(ak.AdapterError, match="not an update of a weight; the adapter cannot be merged"):
            ak.merge(adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        figures.append("merge refused")
    else:
        ak.merge(adapter, tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        # 8-bit linears round their inputs too; what is merged is their weights.
        expected = logits(quantized.dequantized(again)) if quantize == "int8" else answer
        gap = distance(logits(merged), expected)
        figures.append(f"merged {gap:.1e}")
        assert gap < bound
    capsys.readouterr()  # of the trainers
    print(f"{road:11} {quantize or 'fp32':4} {method:11} {', '.join(figures)}; bound {bound:.0e}")
