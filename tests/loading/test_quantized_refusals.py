"""Quantized models: what is refused, what is said, shards of four-bit weights, QLoRA on a real model."""

import importlib.metadata
import json
import logging

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import adapters_kit as ak
from adapters_kit import quantization
from adapters_kit.errors import MissingPackageError, ModelError, UnknownNameError
from adapters_kit.loading import model as loading_model
from tests.support import small, tiny
from tests.support.quantized import paths as quantized_paths

pytest.importorskip("bitsandbytes")


def test_noise_is_filtered_narrowly(caplog):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    model = ak.load(small.model("llama"), quantize="int8")
    with caplog.at_level(logging.DEBUG), torch.no_grad():
        model(**tiny.inputs(model))
        logger.warning("something that matters: %s", 3)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("bitsandbytes")]
    assert said == ["something that matters: 3"]


def test_refusals(tmp_path, monkeypatch):
    folder = small.model("llama")
    with pytest.raises(UnknownNameError, match=r"skip='dwn_proj'.*down_proj"):
        ak.load(folder, quantize="nf4", skip=["dwn_proj"])
    odd = tmp_path / "odd"
    tiny.build("llama", intermediate_size=97).save_pretrained(odd)
    with pytest.raises(ModelError, match=r"97.*down_proj.*int8.*skip=\['down_proj'\]"):
        ak.load(odd, quantize="nf4")
    assert quantized_paths(ak.load(odd, quantize="nf4", skip=["down_proj"]))
    assert quantized_paths(ak.load(odd, quantize="int8"))
    real_version = importlib.metadata.version
    for found, words in (("0.41.0", "0.41.0 is too old"), (None, "needs bitsandbytes: pip install")):

        def version(name, found=found):
            if name != "bitsandbytes":
                return real_version(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(MissingPackageError, match=words):
            ak.load(folder, quantize="nf4")
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"no kernels for 'vulkan'.*cpu"):
        quantization.check_device("nf4", "vulkan")
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ModelError, match=r"no kernels for 'cpu', which quantize='int8' needs.*cuda.*without quantize"):
        ak.load(folder, quantize="int8", device_map="cpu")
    monkeypatch.undo()
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("broken"))
    with pytest.raises(MissingPackageError, match="no native library"):
        ak.load(folder, quantize="int8")


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"quantize": "nf4", "compute_dtype": "fp16"}], ids=str)
def test_fp16_on_a_cpu_that_has_none(options, monkeypatch):
    def half():
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(loading_model, "_half_product", half)
    with pytest.raises(ModelError, match=r"cannot multiply in float16 on this CPU .*Half.*dtype='bf16'"):
        ak.load(small.model("llama"), device_map="cpu", **options)
    assert ak.load(small.model("llama"), device_map="cpu", dtype="bf16") is not None


def test_a_model_without_linears_in_its_blocks(tmp_path):
    folder = tmp_path / "m"
    tiny.build("llama").save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="no linear layers in its blocks"):
        ak.load(folder, quantize="nf4")


def frozen_at_four_bits() -> PeftModel:
    """A LoRA that is not at its start, on nf4 weights that FSDP can shard."""
    torch.manual_seed(0)
    base = ak.load(small.model("llama"), quantize="nf4", dtype="fp32", quant_storage="fp32")
    wrapped = ak.wrap(base, "lora", r=4)
    for path, entry in wrapped.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(entry, std=0.05, generator=torch.Generator().manual_seed(len(path)))
    return wrapped.train()


def in_shards(rank: int, store: str, batch: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sharded = frozen_at_four_bits()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(**batch).loss.backward()
    for path, entry in sharded.named_parameters():
        if entry.requires_grad:
            torch.testing.assert_close(entry.grad.full_tensor(), wanted.pop(path))
    assert not wanted
    packed = sharded.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.to_local().numel() * 2 == packed.numel()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_shards_four_bit_weights(tmp_path):
    """Two CPU processes give the gradients of one; each holds half of the packed weights."""
    whole = frozen_at_four_bits()
    batch = tiny.inputs(whole, labels=True)
    whole(**batch).loss.backward()
    wanted = {path: entry.grad for path, entry in whole.named_parameters() if entry.requires_grad}
    # A fork has imported everything already.
    mp.start_processes(in_shards, (str(tmp_path / "store"), batch, wanted), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def smollm2(smollm2_blocks, tmp_path_factory):
    """The first eight blocks of SmolLM2-135M as a folder in bf16, with its tokenizer."""
    file, folder = smollm2_blocks(8), tmp_path_factory.mktemp("smollm2")
    ak.load(file, dtype="bf16").save_pretrained(folder)
    ak.load_processor(file).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_qlora_on_a_real_model(smollm2, tmp_path):
    """Loss falls as in bf16; save, load, generate, continue."""
    tokenizer = ak.load_processor(smollm2)
    texts = ["User: what is the secret word?\nAnswer: heliotrope", "User: and the second one?\nAnswer: marzipan"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def steps(wrapped, count, lr=4e-3):
        wrapped.train()
        optimizer = torch.optim.AdamW([e for e in wrapped.parameters() if e.requires_grad], lr=lr)
        losses = []
        for _ in range(count):
            loss = wrapped(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    curves = {}
    for kind in (None, "nf4", "int8"):
        torch.manual_seed(0)
        model = ak.load(smollm2, quantize=kind, dtype="bf16")
        with torch.no_grad():
            model(**batch)  # as a first evaluation does
        wrapped = ak.wrap(model, "lora", r=8)
        curves[kind] = steps(wrapped, 10)
        if kind is None:
            continue
        assert curves[kind][-1] < 0.5 * curves[kind][0], curves
        assert abs(curves[kind][0] - curves[None][0]) < 0.4 and abs(curves[kind][-1] - curves[None][-1]) < 0.8, curves
        wrapped.eval().save_pretrained(tmp_path / kind)
        prompt = tokenizer("User: what is the secret word?\nAnswer:", return_tensors="pt")

        def answer(some, prompt=prompt):
            return tokenizer.decode(some.eval().generate(**prompt, max_new_tokens=3, do_sample=False)[0])

        answers = [answer(wrapped)]
        base = ak.load(smollm2, quantize=kind, dtype="bf16")
        again = PeftModel.from_pretrained(base, tmp_path / kind, is_trainable=True)
        answers.append(answer(again))
        assert answers[0] == answers[1] and "hel" in answers[0]
        continued = steps(again, 2, lr=2e-4)
        assert max(continued) < curves[kind][-1], (continued, curves)
