"""Verbs that ship what was trained: merge, combine, export, prove, extract, convert, compress, push, pull."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adapters_kit.errors import ShippingError
from adapters_kit.verbs.display import Shown


def merge(options: argparse.Namespace) -> Shown:
    """Fold an adapter, or several, into the base model's weights, and prove that both compute the same."""
    from adapters_kit.merging.merge import merge as fold

    report = fold(
        options.adapters if len(options.adapters) > 1 else options.adapters[0],
        options.out,
        **_mixing(options),
        base=options.base,
        dtype=options.dtype,
        quantized=options.quantized,
        quantize=options.quantize,
        verify=options.verify,
        calibration=options.calibration,
        overwrite=options.overwrite,
        force=options.force,
    )
    return Shown(report, str(report))


def combine(options: argparse.Namespace) -> Shown:
    """Write one LoRA adapter that stands for several of the same base."""
    from adapters_kit.serving.combine import combine as join

    kinds = {"rank": options.rank, "overwrite": options.overwrite}
    report = join(options.adapters, options.out, **_mixing(options), **kinds)
    return Shown(report, str(report))


def _mixing(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("weights", "method", "density", "seed")}


def export(options: argparse.Namespace) -> Shown:
    """Write an adapter or a merged model in the form that a server takes."""
    from adapters_kit.serving.export import export as write

    kinds = {"format": options.format, "canonical": options.canonical, "rank": options.rank, "dtype": options.dtype}
    report = write(options.source, options.out, base=options.base, overwrite=options.overwrite, **kinds)
    return Shown(report, str(report))


def prove(options: argparse.Namespace) -> Shown:
    """Ask a server what proof.json asks: does the tuned model answer there, or something else? Exit status: 0 the tuned
    model, 3 the base, 4 another template, 5 quantized, 6 cannot tell."""
    from adapters_kit.serving.prove import prove as ask

    folder = options.adapter or options.model
    if folder is None:
        raise ShippingError("Say whose proof to replay: --adapter FOLDER, a run, adapter or merged folder.")
    report = ask(options.url, folder, model=options.model, api_key=options.api_key, timeout=options.timeout)
    return Shown(report, str(report), status=report.status)


def extract(options: argparse.Namespace) -> Shown:
    """Write a LoRA that stands for the difference of two checkpoints, with the error measured."""
    from adapters_kit.merging.extract import extract as take

    kinds = {"r": options.rank, "energy": options.energy, "overwrite": options.overwrite}
    report = take(options.base, options.tuned, options.out, **kinds)
    return Shown(report, str(report))


def convert(options: argparse.Namespace) -> Shown:
    """Turn an adapter into one that servers take: AdapterHub's into peft's, peft's of any kind into a plain LoRA."""
    from adapters_kit.artifacts.adapter import CONFIG
    from adapters_kit.artifacts.json_file import read_json

    config = Path(options.source) / CONFIG
    if config.is_file() and "peft_type" in read_json(config):
        from adapters_kit.merging.extract import convert as make

        kinds = {"r": options.rank, "energy": options.energy, "base": options.base}
        report = make(options.source, "lora", options.out, **kinds)
        return Shown(report, str(report))
    if options.rank is not None or options.energy is not None:
        raise ShippingError(
            f"{options.source} is AdapterHub's, which is converted exactly, at its own rank: leave out --rank and "
            "--energy."
        )
    from adapters_kit.loading import load
    from adapters_kit.methods.adapterhub.folder import convert_folder

    path = convert_folder(options.source, load(options.base, task=options.task), options.out)
    return Shown({"path": path}, f"Converted to {path}")


def compress(options: argparse.Namespace) -> Shown:
    """Write a LoRA at the lowest ranks that keep what it learned, or an adapter without its lowest layers; a run is
    scored before and after."""
    from adapters_kit.compression.compress import compress as shrink

    kinds = {"r": options.rank, "energy": options.energy, "base": options.base, "overwrite": options.overwrite}
    kinds |= {"drop_layers": options.drop_layers, "data": options.data}
    report = shrink(options.source, options.out, **kinds)
    return Shown(report, str(report))


def drop_layers(options: argparse.Namespace) -> Shown:
    """Write a base without the layers that do least; an adapter trained on it heals it."""
    from adapters_kit.recipe import keys_of

    keys = keys_of(options.flags)
    from adapters_kit.compression.drop_layers import drop_layers as drop

    report = drop(
        options.source,
        options.count,
        options.out,
        data=options.data,
        layers=options.layers,
        overwrite=options.overwrite,
        **keys,
    )
    return Shown(report, str(report))


def push(options: argparse.Namespace) -> Shown:
    """Send a run's adapter or a merged model to the model hub, with a card that tells base, data and scores."""
    from adapters_kit.serving.hub import push as send

    sent = send(options.folder, options.repo, private=options.private, license=options.license)
    return Shown(sent, str(sent))


def pull(options: argparse.Namespace) -> Shown:
    """Fetch an adapter or a model from the hub into a folder."""
    from adapters_kit.serving.hub import pull as fetch

    path = fetch(options.repo, options.out, revision=options.revision)
    return Shown({"path": path}, f"{options.repo} is in {path}")
