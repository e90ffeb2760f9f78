"""The subcommands of `fastkv-vllm calibrate`: read prompts, measure, write one artefact."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastkv_vllm.calibrate.artefact import make, save
from fastkv_vllm.calibrate.channels import ChannelRanges, ClipSearch
from fastkv_vllm.calibrate.decays import RecallCurves, Votes, choose_shares, mean_share
from fastkv_vllm.calibrate.duo import DuoSettings, GateTrainer
from fastkv_vllm.calibrate.errors import CalibrationError
from fastkv_vllm.calibrate.fingerprint import model_directory, model_fingerprint
from fastkv_vllm.calibrate.heads import HeadCredit
from fastkv_vllm.calibrate.merging import MergingSettings, MergingTrial
from fastkv_vllm.calibrate.model import CalibrationModel
from fastkv_vllm.calibrate.plot import check_can_plot, plot_recall
from fastkv_vllm.calibrate.progress import PartialFile, Resumable
from fastkv_vllm.calibrate.prompts import Prompt, PromptReader, digest
from fastkv_vllm.calibrate.sharing import LayerDistances, SharingSearch, SharingSettings, pairs_to_try
from fastkv_vllm.calibrate.tsp_layer import Propagation, RecallTables, choose_layer, weakest_recall
from fastkv_vllm.calibrate.tsp_sweep import AnswerSweep

NUM_SHOWN = 8  # heads named in the summary


class Run:
    """What every subcommand does around its measurement.

    Args:
        args: `model`, `prompts`, `num_prompts`, `lengths`, `out`, `resume`, `save_every`, `dtype`, `device`.
        command: command line, for the artefact.
    """

    def __init__(self, args: Namespace, command: str) -> None:
        self._args = args
        self._command = command
        self._directory = model_directory(args.model)
        self._fingerprint = model_fingerprint(self._directory)
        if not args.out.absolute().parent.is_dir():
            raise CalibrationError(f"--out must lie in a directory that exists; {args.out.parent} does not: make it")
        partial_path = args.out.with_name(args.out.name + ".partial")
        self._partial = PartialFile(partial_path, resume=args.resume, every=args.save_every)
        self.reader = PromptReader(self._directory)

    @cached_property
    def model(self) -> CalibrationModel:
        """Loaded when first used: what can be wrong with files is found before."""
        return CalibrationModel(self._directory, dtype=self._args.dtype, device=self._args.device)

    def prompts(self, path: Path, needs: Sequence[str] = ()) -> list[Prompt]:
        """Prompts of a file that this run uses."""
        return self.reader.read(path, needs, lengths=self._args.lengths)[: self._args.num_prompts]

    def measure(self, name: str, work: Resumable, num_steps: int, settings: dict[str, Any]) -> None:
        """Run a phase to its end; `settings` are all that its result depends on beside model and dtype."""
        identity = {"model": self._fingerprint, "dtype": self._args.dtype, **settings}
        self._partial.run(name, work, num_steps, identity=identity)

    def finish(self, kind: str, settings: dict[str, Any], data: dict[str, Any]) -> None:
        """Write the artefact; the partial file has served."""
        settings = {"dtype": self._args.dtype, **settings}
        save(make(kind, self._directory, command=self._command, settings=settings, data=data), self._args.out)
        self._partial.remove()


def calibrate_tsp_layer(args: Namespace, command: str) -> str:
    """Choose the TSP layer; the result in words."""
    if args.plot:
        check_can_plot()
    run = Run(args, command)
    prompts = run.prompts(args.prompts)
    tasks = run.prompts(args.tasks, ["answer"]) if args.tasks else []
    propagation = Propagation(**{field.name: getattr(args, field.name) for field in fields(Propagation)})
    num_queries = args.queries or propagation.window_size
    settings = {**propagation.settings(), "queries": num_queries, "prompts": digest(prompts)}
    work = RecallTables(run.model, prompts, propagation, num_queries)
    run.measure("recall", work, len(prompts), settings)

    recall = weakest_recall(work.tables, args.percentile)
    layer = choose_layer(recall, args.min_recall)
    table = work.tables.mean(dim=0)
    data: dict[str, Any] = {
        "layer": layer,
        "recall": recall.tolist(),
        "table": [
            [value if later > i else None for later, value in enumerate(row)] for i, row in enumerate(table.tolist())
        ],
        "num_prompts": len(prompts),
    }
    lines = [f"TSP layer {layer}: recall {recall[layer]:.3f} in the later layer that it serves worst"]
    if tasks:
        data["sweep"] = sweep = _sweep(run, tasks, propagation, layer)
        lines += [f"right answers with the whole prompt in all layers: {sweep['whole_prompt']:.3f}"]
        lines += [f"right answers with TSP layer {name}: {value:.3f}" for name, value in sweep["layers"].items()]
    settings |= {"min_recall": args.min_recall, "percentile": args.percentile}
    if args.plot:
        plot_recall(table, recall, layer, args.min_recall, args.plot)
    run.finish("tsp-layer", settings, data)
    return "\n".join(lines)


def calibrate_heads(args: Namespace, command: str) -> str:
    """Rate all heads; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts, ["answer", "needle"])
    settings = {"criterion": args.criterion, "prompts": digest(prompts)}
    work = HeadCredit(run.model, run.reader, prompts, args.criterion)
    run.measure(f"heads {args.criterion}", work, len(prompts), settings)
    by_query_head, by_kv_head = work.importance()
    data = {
        "query_heads": by_query_head.tolist(),
        "kv_heads": by_kv_head.tolist(),
        "num_prompts": len(prompts),
        "num_right": work.num_right,
    }
    run.finish("head-importance", settings, data)
    head = f"{work.num_right} of {len(prompts)} prompts answered right; query heads with the largest share:"
    return "\n".join([head, *_largest(by_query_head)])


def calibrate_duo(args: Namespace, command: str) -> str:
    """Learn DuoAttention's gates; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts, ["answer"])
    duo = DuoSettings(**{field.name: getattr(args, field.name) for field in fields(DuoSettings)})
    settings = {**duo.settings(), "prompts": digest(prompts)}
    work = GateTrainer(run.model, prompts, duo)
    run.measure("gates", work, duo.num_steps, settings)
    gates = work.gates.detach().cpu()
    data = {"gates": gates.tolist(), "distance": work.last_distance, "num_prompts": len(prompts)}
    run.finish("retrieval-heads", settings, data)
    head = f"mean gate {gates.mean():.3f}, distance {work.last_distance:.2e}; KV heads with the largest gates:"
    return "\n".join([head, *_largest(gates)])


def calibrate_decays(args: Namespace, command: str) -> str:
    """Choose the rows PyramidInfer hands on; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts)
    votes = Votes(**{field.name: getattr(args, field.name) for field in fields(Votes)})
    settings = {**votes.settings(), "prompts": digest(prompts)}
    work = RecallCurves(run.model, prompts, votes)
    run.measure("decays", work, len(prompts), settings)
    shares = choose_shares(work.curves, args.min_recall, args.percentile)
    data = {"shares": shares, "recall": work.curves.amin(dim=0).tolist(), "num_prompts": len(prompts)}
    run.finish("layer-decays", settings | {"min_recall": args.min_recall, "percentile": args.percentile}, data)
    lines = [f"  after layer {layer}: {share:.3f}" for layer, share in enumerate(shares)]
    return "\n".join([f"shares of a prompt's rows that go on, {mean_share(shares):.3f} kept in the mean:", *lines])


def calibrate_sharing(args: Namespace, command: str) -> str:
    """Choose the layers that read another's entries; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts)
    sharing = SharingSettings(**{field.name: getattr(args, field.name) for field in fields(SharingSettings)})
    identity = {"tokens": sharing.num_tokens, "prompts": digest(prompts)}
    apart = LayerDistances(run.model, prompts, sharing.num_tokens)
    run.measure("distances", apart, len(prompts), identity)
    distances = apart.distances()
    pairs = pairs_to_try(distances)
    work = SharingSearch(run.model, prompts, pairs, sharing)
    settings = {**sharing.settings(), "prompts": digest(prompts)}
    run.measure("pairs", work, len(pairs), settings)
    owners = work.found()
    data = {
        "owners": owners,
        "similarity": work.similarity,
        "distances": distances.tolist(),
        "num_prompts": len(prompts),
    }
    run.finish("layer-sharing", settings, data)
    lines = [f"  layer {layer}: those of layer {owner}" for layer, owner in enumerate(owners) if owner != layer]
    return "\n".join([f"cosine {work.similarity:.3f} of the last hidden states; layers read other entries:", *lines])


def calibrate_merging(args: Namespace, command: str) -> str:
    """Measure what merged layers do to answers; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts, ["answer"])
    merging = MergingSettings(**{field.name: getattr(args, field.name) for field in fields(MergingSettings)})
    settings = {**merging.settings(), "prompts": digest(prompts)}
    work = MergingTrial(run.model, prompts, merging)
    run.measure("merging", work, len(prompts), settings)
    found = work.found()
    data = {"owners": work.owners, **found, "num_prompts": len(prompts)}
    run.finish("layer-merging", settings, data)
    lines = [
        f"  layers {lower} and {lower + 1}: {lost:.3f}, attention changed by {changed:.2f}"
        for lower, (lost, changed) in enumerate(zip(found["lost_by_pair"], found["changed_by_pair"], strict=True))
    ]
    pairs = ", ".join(f"{owner} and {layer}" for layer, owner in enumerate(work.owners) if owner != layer)
    head = f"share of right answer tokens lost with layers {pairs} merged: {found['lost']:.3f}; with one pair alone:"
    return "\n".join([head, *lines])


def calibrate_channels(args: Namespace, command: str) -> str:
    """Group the channels of each head and choose where codes end; the result in words."""
    run = Run(args, command)
    prompts = run.prompts(args.prompts)
    settings = {"num_sink": args.num_sink, "prompts": digest(prompts)}
    ranges = ChannelRanges(run.model, prompts, args.num_sink)
    run.measure("ranges", ranges, len(prompts), settings)
    orders = ranges.orders()
    clips = ClipSearch(run.model, prompts, orders, args.num_sink)
    run.measure("clips", clips, len(prompts), settings)
    found = clips.found()
    run.finish("channel-groups", settings, {"orders": orders.tolist(), **found, "num_prompts": len(prompts)})
    return "\n".join(
        f"{name}: {lost:.3f} of their squared norm is lost, {unmeasured:.3f} in their own order and unclipped"
        for name, lost, unmeasured in zip(("keys", "values"), found["lost"], found["lost_unmeasured"], strict=True)
    )


def _sweep(run: Run, tasks: list[Prompt], propagation: Propagation, layer: int) -> dict[str, Any]:
    """Share of right answers with the chosen TSP layer, with its neighbours, and without one."""

    def accuracy(candidate: int | None) -> float:
        work = AnswerSweep(run.model, run.reader, tasks, propagation, candidate)
        name = "whole prompt" if candidate is None else f"TSP layer {candidate}"
        run.measure(name, work, len(tasks), {**propagation.settings(), "tasks": digest(tasks)})
        return work.accuracy

    candidates = range(max(layer - 1, 0), min(layer + 1, run.model.num_layers - 2) + 1)
    whole_prompt = accuracy(None)
    layers = {str(candidate): accuracy(candidate) for candidate in candidates}
    return {"whole_prompt": whole_prompt, "layers": layers, "num_prompts": len(tasks)}


def _largest(values: torch.Tensor) -> list[str]:
    best = values.flatten().topk(min(NUM_SHOWN, values.numel()))
    places = [divmod(int(i), values.shape[1]) for i in best.indices]
    return [
        f"  layer {layer} head {head}: {value:.3f}" for (layer, head), value in zip(places, best.values, strict=True)
    ]
