"""How long `map_model` takes on a 135 M Llama (SmolLM2's shape) on CPU, beside the one plain forward that it contains.

    python benchmarks/anatomy.py [--rounds 11]

The two are interleaved. Medians in seconds and the median of the ratios go to results/anatomy.json.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from adapters_kit.anatomy import map_model, probe_inputs

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).eval()
    inputs = probe_inputs(model)

    @torch.no_grad()
    def forward() -> None:
        model(**inputs)

    first = seconds(lambda: map_model(model))
    forward()
    pairs = [(seconds(lambda: map_model(model)), seconds(forward)) for _ in range(rounds)]
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "map_model_first_s": first,
        "map_model_s": statistics.median(mapped for mapped, _ in pairs),
        "forward_s": statistics.median(plain for _, plain in pairs),
        "ratio": statistics.median(mapped / plain for mapped, plain in pairs),
        "rounds": rounds,
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
        },
    }
    print(json.dumps(result, indent=2))
    target = Path(__file__).parent / "results" / "anatomy.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
