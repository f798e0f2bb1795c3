"""Every method on 4- and 8-bit bases: it evaluates and trains as the same adapter does on the dequantized fp32 base.

All methods meet four families of different make (grouped heads, biases and a fresh head, cross-attention, transposed
weights): llama at 4 and at 8 bits, the others at one of the two by turns. Every other family whose sizes allow meets
LoRA, a bottleneck, a prefix and IA³, two of them at 4 bits and two at 8, by turns: what differs between families is how
layers are found and called, which these four exercise; the full product would take minutes.
"""

import pytest
import torch
from peft import PeftModel

import adapters_kit as ak
from adapters_kit import quantization
from adapters_kit.errors import ModelError
from tests.support import quantized, tiny

pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "int8")
THOROUGH = ("llama", "bert", "t5", "gpt2")
METHODS = [
    "lora",
    "rslora",
    "dora",
    "adalora",
    "ia3",
    "vera",
    "oft",
    "prompt",
    "p-tuning",
    "houlsby",
    "pfeiffer",
    "parallel",
    "adapterplus",
    "compacter",
    "compacter++",
    "prefix",
    "mam",
    "unipelt",
    ["lora", "prefix"],
    ["ia3", "lora"],
]
OPTIONS = {"adalora": {"total_step": 10}, "oft": {"oft_block_size": 16}}
FROM_WEIGHTS = ("pissa", "olora", "loftq")  # these take their start out of the weights, and refuse rounded ones
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel", "adapterplus", "compacter", "compacter++")
OWN_LINEARS = ("falcon",)  # linears of a class of its own, which transformers does not replace
NO_BRANCHES = ("mamba",)  # neither attention nor FFN
OWN_ATTENTION = ("mpnet", "deberta", "deberta-v2", "xlnet", "gpt-neo", "gptj", "bloom", "mpt", *NO_BRANCHES)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.inputs(model)).logits.float()


def gradients(model) -> dict[str, torch.Tensor | None]:
    model.train()
    torch.manual_seed(0)
    model(**tiny.inputs(model, labels=True)).loss.backward()
    assert all(entry.grad is None for entry in model.parameters() if not entry.requires_grad)
    return {path: entry.grad for path, entry in model.named_parameters() if entry.requires_grad}


def check(name: str, kind: str, method) -> PeftModel:
    """Wrap, evaluate, then train one step, on the quantized base and on its twin."""
    options = OPTIONS.get(method, {}) if isinstance(method, str) else {}
    torch.manual_seed(0)
    wrapped = ak.wrap(quantized.base(name, kind), method, **options)
    quantized.fill(wrapped)
    twin = ak.wrap(quantized.dequantized(quantized.base(name, kind)), method, fuse=False, **options)
    state = wrapped.state_dict()
    adapter = {path for path, entry in twin.named_parameters() if entry.requires_grad}
    assert adapter and adapter == {path for path, entry in wrapped.named_parameters() if entry.requires_grad}
    # Everything that is not a quantized weight: the adapter, and what some methods freeze beside it (VeRA).
    same = {path for path, entry in twin.state_dict().items() if path in state and state[path].shape == entry.shape}
    with torch.no_grad():
        for path, entry in twin.state_dict().items():
            if path in same and state[path].is_floating_point():
                entry.copy_(state[path])
    got, expected = logits(wrapped), logits(twin)
    # int8 rounds activations too: in evaluation on a CPU, always on a GPU.
    assert (got - expected).norm() < (1e-4 if kind == "nf4" else 0.15) * expected.norm(), method
    found, wanted = gradients(wrapped), gradients(twin)
    dead = [path for path, entry in found.items() if entry is None or not entry.any()]
    assert not dead, (method, dead[:5])
    assert all(torch.isfinite(entry).all() for entry in found.values()), method
    assert quantized.cosine(list(found.values()), list(wanted.values())) > 0.9999, method
    return wrapped


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", THOROUGH)
def test_every_method(name, method, tmp_path):
    turn = METHODS.index(method) + THOROUGH.index(name)
    for kind in KINDS if name == "llama" else KINDS[turn % 2 :][:1]:
        wrapped = check(name, kind, method)
        if name != "llama":
            continue
        wrapped.eval().save_pretrained(tmp_path / kind)
        again = PeftModel.from_pretrained(quantized.base(name, kind), tmp_path / kind)
        torch.testing.assert_close(logits(again), logits(wrapped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in (*THOROUGH, *OWN_LINEARS)])
def test_every_family(name, kind):
    turn = tiny.NAMES.index(name)
    bottleneck = BOTTLENECKS[turn % len(BOTTLENECKS)]
    # Each family has a method inside its linears for one kind, and one beside them for the other.
    method = (("lora", "ia3"), (bottleneck, "prefix"))[(turn // 2 + KINDS.index(kind)) % 2][turn % 2]
    if name in NO_BRANCHES and method == bottleneck:
        with pytest.raises(ModelError, match="no place for bottleneck adapters"):
            ak.wrap(quantized.base(name, kind), method)
    elif name in OWN_ATTENTION and method == "prefix":
        with pytest.raises(ModelError, match="no place to join a prefix"):
            ak.wrap(quantized.base(name, kind), method)
    else:
        check(name, kind, method)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_methods_that_start_from_the_weights_refuse_rounded_ones(method, kind):
    model = quantized.base("llama", kind)
    before = logits(model)
    with pytest.raises(ak.AdapterError, match=rf"{method} .*Load it without quantize=, or use method 'lora'"):
        ak.wrap(model, method)
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


@pytest.mark.parametrize("name", OWN_LINEARS)
def test_linears_that_transformers_does_not_replace_are_refused(name):
    with pytest.raises(ModelError, match=r"own class FalconLinear.*without quantize"):
        quantization.quantizable(tiny.build(name))


def test_a_weight_that_is_read_directly_stays(tmp_path):
    """Mamba reads `dt_proj.weight` in its scan; packed into bytes it would be nonsense."""
    tiny.build("mamba").save_pretrained(tmp_path)
    model = ak.load(tmp_path, quantize="nf4", dtype="fp32")
    kept = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", *(f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1))}
    assert torch.isfinite(logits(model)).all()


def test_eight_bit_layers_take_inputs_of_any_number_of_dimensions():
    model = quantized.base("llama", "int8")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 4, 64)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).view(2, 3, 4, 128))
    report = ak.fuse(ak.wrap(model, "lora"))
    assert "forward" in layer.__dict__ and not report.plain, report
