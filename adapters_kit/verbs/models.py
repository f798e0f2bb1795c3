"""Verbs that look: methods, inspect, plan, check, doctor."""

from __future__ import annotations

import argparse
from typing import Any

from adapters_kit.errors import AdapterError
from adapters_kit.names import is_adapter_folder
from adapters_kit.verbs.display import Shown, console, print_table


def methods(options: argparse.Namespace) -> Shown:
    """Every method: what it trains, whether it merges, where it was published."""
    from adapters_kit.methods import table

    found = table()
    merges = {True: "yes", False: "no", None: "?"}
    data: list[dict[str, Any]] = [
        {
            "name": one.name,
            "config": one.config.partition(":")[2],
            "trains": one.trains,
            "when": one.when,
            "merges": one.mergeable,
            "needs": one.needs if one.in_recipes else f"{one.needs} (not in recipes)",
            "paper": one.paper,
        }
        for one in found
    ]
    rows = [
        [one["name"], one["config"], one["trains"], merges[one["merges"]], one["needs"], one["paper"]] for one in data
    ]
    return Shown(data, lambda: print_table(["name", "config", "trains", "merges", "needs", "paper"], rows))


def inspect(options: argparse.Namespace) -> Shown:
    """Blocks, branches and linears of a model, and how much each method would train; reads no weights."""
    import copy

    from adapters_kit import registry
    from adapters_kit.anatomy import map_model, tree
    from adapters_kit.artifacts.adapter import adapter_folder, read_adapter
    from adapters_kit.kernels.fuse import fuse
    from adapters_kit.loading import skeleton
    from adapters_kit.training.run import recipe_of
    from adapters_kit.wrapping import wrap

    model, task = options.model, options.task
    if is_adapter_folder(folder := adapter_folder(model)):  # a run or an adapter: its base is meant
        named = recipe_of(folder)
        base = named.model if named else read_adapter(folder).base
        model, task = base or model, task or (named.task if named else None)
    bare = skeleton(model, task)
    found = map_model(bare)
    # What a start from the weights, or the length of a run, decides does not change the count.
    needed: dict[str, dict[str, Any]] = {
        "adalora": {"total_step": 1},
        "pissa": {"init_lora_weights": True},
        "olora": {"init_lora_weights": True},
    }
    trained: list[dict[str, Any]] = []
    for name in options.methods or registry.names():
        try:
            wrapped = wrap(copy.deepcopy(bare), name, fuse=False, **needed.get(name, {}))
            some, total = wrapped.get_nb_trainable_parameters()
            trained.append({"method": name, "trained_parameters": some, "total_parameters": total})
        except AdapterError as error:
            trained.append({"method": name, "refused": str(error).splitlines()[0]})
    try:
        fused = str(fuse(wrap(copy.deepcopy(bare), "lora", fuse=False)))
    except AdapterError as error:  # a model without a linear layer
        fused = f"no LoRA: {error}"

    def show() -> None:
        console().print(tree(found))
        rows = [
            [one["method"], "", "", one["refused"]]
            if "refused" in one
            else [
                one["method"],
                f"{one['trained_parameters']:,}",
                f"{one['trained_parameters'] / one['total_parameters']:.2%}",
                "",
            ]
            for one in trained
        ]
        print_table(["method", "trained parameters", "of all", "why not"], rows)
        print(fused)

    return Shown({"model": found, "methods": trained, "fused": fused}, show)


def plan(options: argparse.Namespace) -> Shown:
    """What a recipe will train, the memory that a step takes, and whether it fits; reads no weights."""
    from adapters_kit.verbs.training import recipe_of

    if options.length is not None and options.recipe is None and "--data" not in options.flags:
        options.flags = [*options.flags, "--data=unread"]
    recipe = recipe_of(options)
    from adapters_kit.training.plan import plan as make_plan

    made = make_plan(recipe, options.gpu, length=options.length)
    return Shown(made, lambda: print(made))


def check(options: argparse.Namespace) -> Shown:
    """Whether an adapter or a merged model loads in a server, and every reason if not; and which paths, names, access
    tokens and rows of data its text files would tell."""
    from adapters_kit.serving.check import check as look

    report = look(options.folder, options.target, max_lora_rank=options.max_lora_rank)
    data = {"path": str(report.path), "target": report.target, "ok": bool(report), "problems": report.problems}
    data["leaks"] = report.leaks
    data["start"] = report.start
    return Shown(data, str(report), status=0 if report else 1)
