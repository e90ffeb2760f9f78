"""What was thrown away: which entries of one request stay, by layer, KV head and position.

python -m benchmarks.kept_map [--method snapkv] [--config JSON] [--example mk:1024:0] --out FILE.svg
python -m benchmarks.kept_map --model DIR --prompt FILE.txt --method fastkv --config '{"tsp_layer": 15}' --out FILE.png

The request runs in an engine of its own (float32, the whole prompt in one step) whose choices are recorded. One row per
layer and KV head, layer 0 on top; colour is the share of entries that stay of those under a pixel. On the tiny model's
prompts the places the question asks for are marked. `--json` writes the positions themselves.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from transformers import AutoTokenizer

from benchmarks.child import run_in_child
from benchmarks.plots import STYLE, save
from benchmarks.questions import CHECKPOINT, tiny_model_config
from benchmarks.tiny_model.language import make_example
from fastkv_vllm.methods import method_names

WIDTH = 512  # pixels across; longer prompts share them


def kept_positions(model: Path, method: str, config: dict[str, Any], prompt: list[int]) -> list[list[list[int]]]:
    """Positions kept of one prompt, per layer and KV head, ascending; [L][H][K]."""
    task = {"model": str(model), "method": method, "config": config}
    (answer,) = run_in_child(
        "benchmarks.oracle.engine_child", {**task, "prompts": [prompt], "max_tokens": 1, "stop_token": 0}
    )
    return answer["kept"]


def draw(kept: list[list[list[int]]], num_tokens: int, title: str, marked: list[int]) -> Any:
    """The map as a figure.

    Args:
        kept: as `kept_positions` gives them.
        num_tokens: tokens of the prompt.
        marked: positions to point at.
    """
    num_layers, num_heads = len(kept), len(kept[0])
    pixels = min(WIDTH, num_tokens)
    edges = np.linspace(0, num_tokens, pixels + 1)
    shares = np.stack([np.histogram(head, edges)[0] for layer in kept for head in layer]) / (num_tokens / pixels)
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.16 * len(shares)))
    image = axes.imshow(
        shares,
        aspect="auto",
        cmap="cividis",
        vmin=0,
        vmax=1,
        interpolation="none",
        extent=(0, num_tokens, len(shares), 0),
    )
    for position in marked:
        axes.annotate("", (position, 0), (position, -0.06 * len(shares)), arrowprops={"arrowstyle": "->", "lw": 0.8})
    for layer in range(1, num_layers):
        axes.axhline(layer * num_heads, color="white", lw=0.4)
    axes.set_yticks([(layer + 0.5) * num_heads for layer in range(num_layers)], range(num_layers))
    axes.set(xlabel="position in the prompt [tokens]", ylabel=f"layer ({num_heads} KV heads each)")
    axes.set_title(title, pad=22 if marked else 6)
    figure.colorbar(image, ax=axes, label="share kept", pad=0.01)
    figure.tight_layout()
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: the repository's small model)")
    parser.add_argument("--method", choices=method_names(), default="fastkv")
    parser.add_argument("--config", type=json.loads, help="settings of the method, a JSON object")
    parser.add_argument("--prompt", type=Path, help="text file to use as the prompt")
    parser.add_argument("--example", default="mk:1024:0", help="task:tokens:seed of the tiny model's language")
    parser.add_argument("--out", type=Path, required=True, help="file for the figure, .svg or .png")
    parser.add_argument("--json", type=Path, help="file for the positions")
    args = parser.parse_args()
    if (args.model is None) != (args.prompt is None):
        parser.error("--model and --prompt go together: the built-in examples are in the tiny model's language")
    config = args.config if args.config is not None else tiny_model_config(args.method) if args.model is None else {}
    if args.model is None:
        task, length, seed = args.example.split(":")
        example = make_example(task, int(length), int(seed))
        prompt, words = example.prompt_ids, ["<s>", *example.prompt.split()]
        answer = example.answer.split()
        marked = [i for i in range(len(words) - 3) if words[i : i + 4] == answer[:4]]
    else:
        prompt, marked = AutoTokenizer.from_pretrained(args.model).encode(args.prompt.read_text()), []
    kept = kept_positions(args.model or CHECKPOINT, args.method, config, prompt)
    with plt.rc_context(STYLE):
        name = " ".join([args.method, *(f"{key}={value}" for key, value in config.items())])
        title = f"{name}: {len(kept[0][0])} of {len(prompt)} entries stay per layer and KV head"
        save(draw(kept, len(prompt), title, marked), args.out)
    if args.json is not None:
        args.json.write_text(json.dumps({"method": args.method, "config": config, "tokens": len(prompt), "kept": kept}))
    print(args.out)


if __name__ == "__main__":
    main()
