"""Fused LoRA in two processes: DDP and FSDP2, against one process with the whole batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adapters_kit.kernels.fuse import fuse
from adapters_kit.kernels.lora import LoraLinear
from tests.support import tiny
from tests.support.fused import gradients, lora, relative

KINDS = ["ddp", "fsdp", "fsdp parts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def model_and_batch():
    model = lora(tiny.build("llama", num_hidden_layers=2)).train()
    fuse(model)
    return model, tiny.inputs(model, batch=4, labels=True)


def step(rank, kind):
    """Gradients of this rank's half of the batch, all-reduced, and the projections of each node that ran."""
    model, batch = model_and_batch()
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    nodes = []
    real = LoraLinear.apply
    LoraLinear.apply = lambda *args: nodes.append(len(args[5])) or real(*args)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # the second step fails if the first left a gradient unreduced
            model.zero_grad()
            wrapped(**half).loss.backward()
    else:
        mesh = init_device_mesh("cpu", (2,))
        if kind == "fsdp parts":  # every linear its own unit: its weight is sharded when the LoRA layer looks at it
            for module in list(model.modules()):
                if type(module) is torch.nn.Linear:
                    fully_shard(module, mesh=mesh)
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**half).loss.backward()
    LoraLinear.apply = real
    found = {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in ((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
    }
    return found, nodes


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for kind in KINDS:
            made = step(rank, kind)
            if rank == 0:
                torch.save(made, folder / f"{kind}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes found, a file a kind: they are started once, for all kinds."""
    made = tmp_path_factory.mktemp("two")
    # A fork has imported everything already.
    mp.start_processes(worker, (free_port(), made), nprocs=2, start_method="fork")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind, folder):
    model, batch = model_and_batch()
    halves = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    (sum(model(**half).loss for half in halves) / 2).backward()
    expected = gradients(model)
    found, nodes = torch.load(folder / f"{kind}.pt")
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative(found[name], grad) < 1e-5, name
    steps = 2 if kind == "ddp" else 1
    assert sum(nodes) == (0 if kind == "fsdp parts" else 14 * steps)
