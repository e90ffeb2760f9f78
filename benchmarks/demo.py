"""Plain vLLM and `--kv-compression fastkv` side by side on the tiny model: python -m benchmarks.demo [-n 20]

Each server answers the same questions: 2040 tokens of filler with one fact stated somewhere, and the question about
it at the end. Printed per server:

- *answers right*: exact match, greedy.
- *prompt blocks held*: KV-cache blocks of one prompt after its prefill, measured while the server decodes its answer:
  `vllm:kv_cache_usage_perc` x the pool's size from `/metrics`, blocks of answer tokens not counted.
- *time to first token*: median wall time seen by the client, requests one after another, streamed. On a model this
  small most of it is not attention: `make bench` measures the speed-up of prefill.

Both servers run eager: it saves a minute of compilation, and steps with token-selective propagation always do.

Ends with exit status 1 if the compressing server did not compress each prompt.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import median

from benchmarks.questions import CHECKPOINT, ask, prompt_blocks_held, tiny_model_config
from benchmarks.server import sample_value, serve
from benchmarks.table import format_table
from benchmarks.tiny_model.language import Example, make_example

METHOD = "fastkv"
PROMPT_TOKENS = 2040  # ends inside a block: the answer's first tokens do not change how many blocks are held
TASK = "niah"
NUM_WARM_UPS = 2
COUNTERS = (
    "vllm:fastkv_requests_compressed_total",
    "vllm:fastkv_prompt_tokens_seen_total",
    "vllm:fastkv_prompt_tokens_kept_total",
    "vllm:fastkv_blocks_freed_total",
    "vllm:fastkv_tsp_rows_in_total",
    "vllm:fastkv_tsp_rows_out_total",
)


@dataclass(frozen=True)
class Outcome:
    """What one server showed; `counters` are those of compression, by metric name."""

    num_right: int
    blocks_held: int
    first_token_s: float
    counters: dict[str, float]
    num_prompts: int


def run_server(method: str | None, examples: list[Example], warm_ups: list[Example]) -> Outcome:
    """Start a server, ask it everything, stop it; blocks are counted with the last warm-up."""
    config = None if method is None else tiny_model_config(method)
    start = time.perf_counter()
    with serve(CHECKPOINT, method=method, config=config, extra=["--enforce-eager"]) as server:
        print(f"{method or 'plain vLLM'}: server up after {time.perf_counter() - start:.0f} s", flush=True)
        ask(server, warm_ups[:-1])
        blocks_held = prompt_blocks_held(server, warm_ups[-1])
        replies = ask(server, examples)
        samples = server.metrics()
    return Outcome(
        num_right=sum(reply.is_right(example) for reply, example in zip(replies, examples, strict=True)),
        blocks_held=blocks_held,
        first_token_s=median(reply.first_token_s for reply in replies),
        counters={name: sample_value(samples, name) for name in COUNTERS if name in samples},
        num_prompts=len(warm_ups) + len(examples),
    )


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="questions")
    args = parser.parse_args()
    examples = [make_example(TASK, PROMPT_TOKENS, seed) for seed in range(args.n + NUM_WARM_UPS)]
    warm_ups = [examples.pop() for _ in range(NUM_WARM_UPS)]
    outcomes = {
        "plain vLLM": run_server(None, examples, warm_ups),
        f"--kv-compression {METHOD}": run_server(METHOD, examples, warm_ups),
    }
    plain, compressed = outcomes.values()
    if compressed.counters.get(COUNTERS[0]) != compressed.num_prompts:
        print(f"NOT COMPRESSED: {compressed.num_prompts} prompts sent, counters {compressed.counters}", file=sys.stderr)
        return 1
    rows = [
        [name, f"{o.num_right} of {args.n}", str(o.blocks_held), f"{o.first_token_s * 1e3:.0f} ms"]
        for name, o in outcomes.items()
    ]
    header = [f"{PROMPT_TOKENS} prompt tokens", "answers right", "prompt blocks held", "time to first token"]
    print(f"\n{format_table(header, rows)}\n\nThe compressing server's own account, from /metrics:")
    for name, value in compressed.counters.items():
        print(f"  {name:<40} {value:.0f}")
    print(f"Cache of a finished prompt: {plain.blocks_held / compressed.blocks_held:.1f} times smaller.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
