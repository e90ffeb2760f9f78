"""A chat with an image, as a client sends it, to a server of a vision-language model that compresses."""

import base64
import io

from benchmarks.server import serve
from fastkv_vllm.config import CompressionConfig
from tests.reference.images import NUM_ROWS, make_image_checkpoint, pixels
from tests.server.conftest import ENVIRONMENT, FLAGS, MODEL, client_of

SETTINGS = {"retention_ratio": 0.2, "min_tokens": 128}
BLOCK_SIZE = 32


def test_a_chat_with_an_image_is_compressed(tmp_path):
    png = io.BytesIO()
    pixels(0).save(png, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    before, after = ([f"w{4 + i % 400}" for i in range(n)] for n in (300, 60))
    content = [
        {"type": "text", "text": " ".join(before)},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " ".join(after)},
    ]
    checkpoint = make_image_checkpoint(tmp_path / "checkpoint")
    with serve(checkpoint, method="vl_cache", config=SETTINGS, extra=FLAGS, env=ENVIRONMENT) as server:
        reply = client_of(server).chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        metrics = server.metrics()
    num_tokens = len(before) + NUM_ROWS + len(after)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (num_tokens, 8)
    plan = CompressionConfig("vl_cache", **SETTINGS).plan(num_tokens, BLOCK_SIZE)
    counted = {
        name: sum(sample.value for sample in metrics[f"vllm:fastkv_{name}_total"])
        for name in ("requests_compressed", "prompt_tokens_seen", "prompt_tokens_kept", "blocks_freed")
    }
    assert counted == {
        "requests_compressed": 1,
        "prompt_tokens_seen": num_tokens,
        "prompt_tokens_kept": plan.num_kept,
        "blocks_freed": plan.num_freed_blocks,
    }
