"""prove(), asked of llama.cpp's own server. Needs llama-cpp-python with its server:
pip install "adapters-kit[llama-cpp]" "llama-cpp-python[server]", which builds for minutes."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch

import adapters_kit as ak
from adapters_kit.artifacts.proof import make_proof, runner
from adapters_kit.merging.base_folder import convert_gguf
from adapters_kit.serving import llama_cpp as gguf
from tests.support.shipping import load, train_on

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytestmark = pytest.mark.slow


@contextmanager
def server(file, **options):
    """The address of llama.cpp's server with a file. `logits_all` is what it needs to give log-probabilities."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"model": file, "port": port, "n_ctx": 256, "n_threads": 2, "logits_all": True, **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    log = file.parent / "server.log"
    with open(log, "w") as written, subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT) as process:
        try:
            url, ready = f"http://127.0.0.1:{port}", False
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                    ready = True
                    break
                except OSError:
                    time.sleep(0.1)
            assert ready, log.read_text()[-2000:]
            yield url
        finally:
            process.kill()


@pytest.fixture(scope="module")
def shipped(smollm2_blocks, tmp_path_factory):
    """A folder with an adapter and its proof, and the files that a server takes."""
    pytest.importorskip("llama_cpp.server.app", reason='needs pip install "llama-cpp-python[server]" (a long build)')
    try:
        gguf.converters()
    except ak.AdapterError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("live")
    base = convert_gguf(smollm2_blocks(8), folder / "base")
    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
    torch.manual_seed(0)
    tuned = train_on(base, config, folder / "adapter", scale=0.02)
    ak.record(folder / "adapter", base)
    plain = load(base)
    proof = make_proof(runner(tuned), runner(plain), ak.load_processor(base), "float32", steps=3)
    proof.write(folder / "adapter")
    ak.export(base, folder / "base.gguf", format="gguf", dtype="float32")
    ak.export(folder / "adapter", folder / "adapter.gguf", format="gguf", dtype="float32", base=base)
    shutil.copytree(folder / "adapter", folder / "twice")
    told = json.loads((folder / "twice/adapter_config.json").read_text())
    (folder / "twice/adapter_config.json").write_text(json.dumps(told | {"lora_alpha": 2 * told["lora_alpha"]}))
    ak.export(folder / "twice", folder / "twice.gguf", format="gguf", dtype="float32", base=base)
    ak.merge(folder / "adapter", folder / "merged", verify="off")
    ak.export(folder / "merged", folder / "q8.gguf", format="gguf", dtype="q8_0")
    shutil.rmtree(folder / "merged")
    return folder


@pytest.mark.parametrize(
    ("file", "lora", "template", "verdict"),
    [
        ("base.gguf", "adapter.gguf", None, "the tuned model"),
        ("base.gguf", None, None, "the base"),
        ("base.gguf", "twice.gguf", None, "cannot tell"),
        ("base.gguf", "adapter.gguf", "llama-2", "another template"),
        ("q8.gguf", None, None, "quantized"),
    ],
    ids=["right adapter", "no adapter", "wrong scale", "wrong template", "q8 file"],
)
def test_what_answers(file, lora, template, verdict, shipped):
    options = {"lora_path": shipped / lora} if lora else {}
    with server(shipped / file, **options, **({"chat_format": template} if template else {})) as url:
        report = ak.prove(url, shipped / "adapter")
    print(report)
    assert report.verdict == verdict, str(report)
    if verdict == "cannot tell":
        assert "scale" in str(report)
