"""What a method at a ratio does to answers: questions to real servers over the OpenAI API.

python -m benchmarks.quality [--methods none,fastkv,...] [--ratios 0.1] [--protocols question,context] [--json FILE]
python -m benchmarks.quality --suite ruler --model MODEL_DIR [--data DIR] --lengths 4096,16384

One `vllm serve` per method and ratio, the same questions to each, temperature 0. A cell is the mean score with its
95 % interval and, for a method, its ratio to plain vLLM in the same run, or in the report the rows are added to (the
questions are the same). Plain vLLM is asked each prompt once, whatever the protocol.

| protocol | what is compressed | what a later turn of one conversation sees |
|---|---|---|
| question | the whole prompt, its question included | everything before it, compressed afresh |
| context | the context, before the question is read | each question stands alone: one context, many requests |
| once | context and first question | what stayed of them, and the turns since |

Ends with an error where a server's own counters do not say that each prompt was compressed that should have been.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.environment import describe_command, describe_environment
from benchmarks.prompts import PROTOCOLS, Prompt, PromptBuilder
from benchmarks.questions import CHECKPOINT, PLAIN, tiny_model_config
from benchmarks.scores import summarise
from benchmarks.server import BLOCK_SIZE, Server, sample_value, serve
from benchmarks.suites import SUITES, make_suite
from benchmarks.table import format_table
from fastkv_vllm.cache import PromptPlan
from fastkv_vllm.codecs import NO_CODEC, EntryShape
from fastkv_vllm.config import CompressionConfig
from fastkv_vllm.methods import method_names

CONCURRENCY = 4
NO_GUARD = "none"
NUM_DEPTHS = 10  # rows of a needle map
# Methods whose line is that of a tenth; each costs a server and about 40 CPU seconds.
QUICK_METHODS = (PLAIN, "fastkv", "snapkv", "streamingllm", "pyramidkv", "adakv", "vatp", "tova", "asl", "gemfilter")
QUICK = {"methods": ",".join(QUICK_METHODS), "tasks": "niah,mk,mv", "lengths": "1024", "n": 24}


SMALL_MODEL = EntryShape(head_dim=64, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Contender:
    """What is served: a method with its settings, or plain vLLM with none; `entry` is of the model's cache."""

    method: str
    config: dict[str, Any]
    entry: EntryShape = SMALL_MODEL

    @property
    def is_plain(self) -> bool:
        return self.method == PLAIN

    @property
    def name(self) -> str:
        if self.is_plain:
            return self.method
        more = ", measured" if "layer_shares" in self.config else ""
        more += f" {self.codec}" if self.codec else ""
        more += f", {self.config['channel_ratio']:g} of channels" if "channel_ratio" in self.config else ""
        more += f", {self.config['value_channel_ratio']:g} of values" if "value_channel_ratio" in self.config else ""
        more += f", recall {self.config['min_attention_recall']:g}" if "min_attention_recall" in self.config else ""
        return f"{self.method} {self.retention_ratio:.2g}{more}"

    @property
    def codec(self) -> str | None:
        """How what stays is stored, where not as it is."""
        codec = self.config.get("codec", NO_CODEC)
        return None if codec == NO_CODEC else codec

    @property
    def retention_ratio(self) -> float | None:
        """What the settings say or what follows from them; None: a budget in tokens."""
        return CompressionConfig.from_mapping(self.method, self.config).retention_ratio


@dataclass(frozen=True)
class Cell:
    """A column of the table; `turns` is "1" or, of a conversation, "2+"."""

    task: str
    group: str
    protocol: str
    turns: str

    def __str__(self) -> str:
        turns = "" if self.turns == "1" else f"turns {self.turns}"
        return " ".join(filter(None, (self.task, self.group, turns)))


@dataclass(frozen=True)
class Answer:
    """What came back; one that is not finished was cut off.

    `kept` is the share of what was compressed that stayed, 1 where nothing was.
    """

    text: str
    is_finished: bool
    kept: float = 1.0


@dataclass(frozen=True)
class Scored:
    """An answer's score and where it belongs."""

    cell: Cell
    prompt: Prompt
    answer: Answer
    score: float


def measure(
    contender: Contender, model: Path, prompts: dict[str, list[Prompt]], extra: Sequence[str] = ()
) -> list[Scored]:
    """All answers of one contender, given by a server of its own.

    Args:
        prompts: by protocol; what two protocols share is asked once.
        extra: more flags for the server.

    Raises:
        RuntimeError: the server did not compress what it should have, or compressed something else.
    """
    flags = {} if contender.is_plain else {"method": contender.method, "config": contender.config}
    answers: dict[tuple[int, ...], Answer] = {}
    scored = []
    with serve(model, extra=["--enforce-eager", *extra], **flags) as server:
        for protocol, batch in prompts.items():
            keys = [(0 if contender.is_plain else p.num_compressed, *p.token_ids) for p in batch]
            fresh = {key: p for key, p in zip(keys, batch, strict=True) if key not in answers}
            answers |= dict(zip(fresh, ask(server, list(fresh.values()), contender), strict=True))
            for key, prompt in zip(keys, batch, strict=True):
                turns = "1" if protocol == "context" or prompt.turn == 0 else "2+"
                cell = Cell(prompt.question.task, prompt.question.group, protocol, turns)
                scored.append(Scored(cell, prompt, answers[key], score(prompt, answers[key])))
            print(f"{contender.name}, {protocol}: {len(fresh)} prompts asked", file=sys.stderr, flush=True)
        require_compressed(server, contender, [key[0] for key in answers])
    return scored


def ask(server: Server, prompts: Sequence[Prompt], contender: Contender) -> list[Answer]:
    """Answers to the prompts, in order, at temperature 0."""

    def complete(prompt: Prompt) -> Answer:
        extra = {} if contender.is_plain else {"vllm_xargs": {"kv_context_tokens": prompt.num_compressed}}
        reply = client.completions.create(
            model=server.model,
            prompt=prompt.token_ids,
            temperature=0,
            max_tokens=prompt.question.max_new_tokens,
            extra_body=extra,
        )
        (choice,) = reply.choices
        done = ((reply.model_extra or {}).get("kv_transfer_params") or {}).get("fastkv", {})
        kept = done["prompt_tokens_kept"] / done["prompt_tokens_seen"] if "prompt_tokens_kept" in done else 1.0
        return Answer(choice.text, choice.finish_reason == "stop", kept)

    with (
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=1800) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        return list(pool.map(complete, prompts))


def score(prompt: Prompt, answer: Answer) -> float:
    """Score in [0, 1]; an answer that was cut off is wrong where the question asks for an end."""
    question = prompt.question
    if question.needs_end and not answer.is_finished:
        return 0.0
    return question.metric(answer.text, question.turns[prompt.turn].answers)


def require_compressed(server: Server, contender: Contender, num_compressed: Sequence[int]) -> None:
    """Refuse figures of a server that did not do what it was asked to.

    Args:
        num_compressed: leading tokens to compress, of each prompt sent.

    Raises:
        RuntimeError: the server's counters differ from what its settings mean for these prompts.
    """
    samples = server.metrics()
    expected = count_compressed(contender, num_compressed)
    compressed = sample_value(samples, "vllm:fastkv_requests_compressed_total")
    is_idle = expected == 0 and not contender.is_plain and contender.retention_ratio != 1
    if compressed != expected or is_idle:
        left_alone = sample_value(samples, "vllm:fastkv_requests_left_alone_total")
        raise RuntimeError(
            f"{contender.name}: {len(num_compressed)} prompts sent, {expected} of them to compress; the server "
            f"compressed {compressed:.0f} and left {left_alone:.0f} alone"
        )


def count_compressed(contender: Contender, num_compressed: Sequence[int]) -> int:
    """How many prompts the contender's settings compress; the others are left alone, as short ones are."""
    if contender.is_plain:
        return 0
    return sum(plan is not None for plan in _plans(contender, num_compressed))


def share_held(contender: Contender, num_compressed: Sequence[int]) -> float:
    """Mean share of the prompts' whole blocks that stay: the bytes held against those of plain vLLM.

    Args:
        num_compressed: leading tokens to compress, of each prompt.
    """
    if contender.is_plain:
        return 1.0
    shares = [p.num_stored_blocks / p.num_whole_blocks if p else 1.0 for p in _plans(contender, num_compressed)]
    return sum(shares) / len(shares)


def _plans(contender: Contender, num_compressed: Sequence[int]) -> list[PromptPlan | None]:
    """The plan of each prompt; None: it is left alone."""
    config = CompressionConfig.from_mapping(contender.method, contender.config)
    plans = [config.plan(n, BLOCK_SIZE, entry=contender.entry) for n in num_compressed]
    return [plan if isinstance(plan, PromptPlan) else None for plan in plans]


def make_rows(contender: Contender, scored: Sequence[Scored], plain: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of the report per cell.

    Args:
        plain: rows of plain vLLM, or none; what the ratios refer to.
    """
    plain_means = {_cell_of(row): row["mean"] for row in plain}
    rows = []
    for cell in dict.fromkeys(s.cell for s in scored):
        members = [s for s in scored if s.cell == cell]
        row = {"method": contender.method, "config": contender.config, **asdict(cell)}
        row |= asdict(summarise([s.score for s in members]))
        row["ratio_to_plain"] = row["mean"] / plain_means[cell] if plain_means.get(cell) else None
        num_compressed = [s.prompt.num_compressed for s in members]
        row["compressed"] = count_compressed(contender, num_compressed)
        row["held"] = share_held(contender, num_compressed)
        row["kept"] = sum(s.answer.kept for s in members) / len(members)
        row["truncated"] = sum(s.prompt.is_truncated for s in members)
        if all("depth" in s.prompt.question.meta for s in members):
            row["by_depth"] = _by_depth(members)
        rows.append(row)
    return rows


def _by_depth(members: Sequence[Scored]) -> list[list[float]]:
    """Sum of scores and questions per tenth of the context the needle lies in."""
    bins = [[0.0, 0] for _ in range(NUM_DEPTHS)]
    for member in members:
        place = bins[min(int(member.prompt.question.meta["depth"] * NUM_DEPTHS), NUM_DEPTHS - 1)]
        place[0] += member.score
        place[1] += 1
    return bins


def tables(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Per protocol its title and its Markdown table, from the report alone."""
    made = []
    for protocol in dict.fromkeys(row["protocol"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["protocol"] == protocol]
        cells = list(dict.fromkeys(map(_cell_of, rows)))
        lines: dict[str, dict[Cell, str]] = {}
        for row in rows:
            text = f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            if row["method"] != PLAIN and row["compressed"] == 0:
                text = "left alone"
            elif row["method"] != PLAIN and row["ratio_to_plain"] is not None:
                text += f" x{row['ratio_to_plain']:.2f}"
            if "min_attention_recall" in row["config"]:
                text += f", {row['kept']:.2f} stay"
            lines.setdefault(Contender(row["method"], row["config"]).name, {})[_cell_of(row)] = text
        body = [[name, *(line.get(cell, "") for cell in cells)] for name, line in lines.items()]
        made.append((protocol, format_table([f"protocol {protocol}", *map(str, cells)], body)))
    return made


def plain_rows(report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of plain vLLM in a report."""
    return [] if report is None else [row for row in report["rows"] if row["method"] == PLAIN]


def merge_rows(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of both reports, the new ones in the place of the old ones of the same contender.

    Raises:
        ValueError: the reports asked other questions, so that their rows do not belong in one table.
    """

    def asked(report: dict[str, Any]) -> tuple[Any, ...]:
        return report["suite"], report["model"], {_cell_of(row) for row in report["rows"]}

    if asked(old) != asked(new):
        raise ValueError("the report to add to has other questions (suite, model, tasks, lengths or protocols)")
    contenders: dict[str, list[dict[str, Any]]] = {}
    for report in (old, new):
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in report["rows"]:
            rows.setdefault(json.dumps([row["method"], row["config"]], sort_keys=True), []).append(row)
        contenders |= rows
    return [row for rows in contenders.values() for row in rows]


def _cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["task"], row["group"], row["protocol"], row["turns"])


def main() -> None:
    """Command line."""
    args = parse_args()
    model = args.model or CHECKPOINT
    tokenizer = AutoTokenizer.from_pretrained(model)
    suite = make_suite(args.suite, tokenizer, [int(n) for n in args.lengths.split(",")], args.data)
    builder = PromptBuilder(tokenizer, args.max_model_len, args.chat)
    prompts: dict[str, list[Prompt]] = {protocol: [] for protocol in args.protocols.split(",")}
    for task in args.tasks.split(",") if args.tasks else suite.tasks:
        for question in (q for group in suite.groups(task) for q in suite.questions(task, group, args.n)):
            for protocol, batch in prompts.items():
                if protocol != "once" or len(question.turns) > 1:
                    batch += builder.prompts(question, protocol)
    report = {
        "benchmark": "quality",
        "command": describe_command(),
        "environment": describe_environment(),
        "suite": args.suite,
        "model": Path(model).name if args.model else CHECKPOINT.relative_to(Path(__file__).parents[1]).as_posix(),
        "rows": [],
    }
    known = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else None
    records = []
    flags = ["--max-model-len", str(args.max_model_len), *args.server_flag]
    asked = contenders(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda contender: measure(contender, model, prompts, flags), asked)
        for contender, scored in zip(asked, results, strict=True):
            plain = plain_rows(report) or plain_rows(known)
            report["rows"] += make_rows(contender, scored, plain)
            # After each contender: one whose server fails does not take the others' rows with it.
            if args.json is not None:
                rows = merge_rows(known, report) if known else report["rows"]
                args.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
            records += [
                {
                    "contender": contender.name,
                    **asdict(s.cell),
                    "turn": s.prompt.turn,
                    **asdict(s.answer),
                    "score": s.score,
                }
                for s in scored
            ]
    for _, table in tables(report):
        print(f"\n{table}")
    if args.answers is not None:
        args.answers.write_text("".join(json.dumps(record) + "\n" for record in records))


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Plain vLLM once, each method at each ratio with each codec and guard, measured shares at their own."""
    made = []
    entry = SMALL_MODEL if args.model is None else entry_of(args.model)
    for method in args.methods.split(","):
        if method == PLAIN:
            made.append(Contender(PLAIN, {}))
            continue
        settings = {**(tiny_model_config(method) if args.model is None else {}), **args.config.get(method, {})}
        if "layer_shares" in settings:  # the ratio follows
            made.append(Contender(method, settings, entry))
            continue
        codecs = [{} if codec == NO_CODEC else {"codec": codec} for codec in args.codecs.split(",")]
        guards = [
            {} if floor == NO_GUARD else {"min_attention_recall": float(floor)} for floor in args.recalls.split(",")
        ]
        ratios = [{"retention_ratio": float(ratio)} for ratio in args.ratios.split(",")]
        made += [
            Contender(method, {**settings, **ratio, **guard, **codec}, entry)
            for codec, guard, ratio in itertools.product(codecs, guards, ratios)
        ]
    return made


def entry_of(model: Path) -> EntryShape:
    """An entry of the cache of a checkpoint served in its own dtype."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return EntryShape(head_dim, config.dtype or torch.float32)


def parse_args() -> argparse.Namespace:
    """The command line, checked as far as it can be without a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="tiny", help="tiny is the built-in one")
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: the repository's small model)")
    parser.add_argument("--data", type=Path, help="directory of the suite's files")
    parser.add_argument("--methods", default=",".join([PLAIN, *method_names()]), help="comma-separated")
    parser.add_argument("--ratios", default="0.1", help="retention ratios, comma-separated")
    parser.add_argument("--codecs", default=NO_CODEC, help="how what stays is stored, comma-separated")
    parser.add_argument("--recalls", default=NO_GUARD, help="floors of the guard, comma-separated; none: without it")
    parser.add_argument(
        "--config", type=json.loads, default={}, help='more settings: \'{"fastkv": {"tsp_layer": 15}}\''
    )
    parser.add_argument("--protocols", default=",".join(PROTOCOLS), help="comma-separated")
    parser.add_argument("--tasks", help="comma-separated (default: all of the suite)")
    parser.add_argument("--lengths", default="1024,2048", help="prompt tokens, for suites that make their prompts")
    parser.add_argument("-n", type=int, default=48, help="questions per task and group")
    parser.add_argument("--max-model-len", type=int, default=4608, help="tokens; longer contexts lose their middle")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    parser.add_argument("--server-flag", action="append", default=[], help="one more flag of vllm serve; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="servers at once")
    parser.add_argument("--quick", action="store_true", help=f"the main lines in minutes: {QUICK}")
    parser.add_argument("--json", type=Path, help="file for the report; contenders it has and that are not asked stay")
    parser.add_argument("--answers", type=Path, help="file for every single answer, one JSON object a line")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    for name, allowed in {"methods": (PLAIN, *method_names()), "protocols": PROTOCOLS}.items():
        unknown = [word for word in getattr(args, name).split(",") if word not in allowed]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; known: {', '.join(allowed)}")
    unknown = [task for task in (args.tasks or "").split(",") if task and task not in SUITES[args.suite].tasks]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(unknown)}; known: {', '.join(SUITES[args.suite].tasks)}")
    return args


if __name__ == "__main__":
    main()
