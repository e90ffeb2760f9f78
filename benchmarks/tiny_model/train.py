"""Train the tiny model from scratch on one CPU thread and write a Hugging Face checkpoint.

python -m benchmarks.tiny_model.train [--out benchmarks/tiny_model/checkpoint] [--seconds 600] [--seed 11]

The sequence length grows whenever the model answers well enough; the last stage mixes all lengths. The
learning rate falls linearly at the end of the time given, so more time is more steps of the last stage.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.tiny_model.checkpoint_files import save_checkpoint
from benchmarks.tiny_model.corpus import is_filler, make_batch
from benchmarks.tiny_model.language import VOCAB_SIZE
from benchmarks.tiny_model.model import Llama
from benchmarks.tiny_model.muon import Muon

log = logging.getLogger("tiny_model")

CHECKPOINT = Path(__file__).parent / "checkpoint"

# Page faults of freed and returned buffers would take half of the time: glibc shall keep what it has.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
}

MICRO_BATCH_TOKENS = 4096
STAGES = {128: 1, 256: 1, 512: 2, 1024: 2, 2048: 2}  # length: micro-batches a step
MIX = (128, 256, 512, 512, 1024, 1024, 2048, 4096)
MIX_MICRO_BATCHES = 2
STAGE_ACCURACY, ACCURACY_STEPS = 0.93, 20
FILLER_WEIGHT, MAX_FILLER_TARGETS = 0.05, 512
MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS, DECAY_SHARE, FINAL_LR = 50, 0.4, 0.02
LOG_SECONDS = 10.0


class Curriculum:
    """Which length comes next: one stage after another, each until its accuracy is reached, then the mix."""

    def __init__(self) -> None:
        self._stages = deque(STAGES)
        self._recent: deque[float] = deque(maxlen=ACCURACY_STEPS)

    def next_batch(self, rng: random.Random) -> tuple[int, int]:
        """Sequence length and number of micro-batches of the next step."""
        if not self._stages:
            return rng.choice(MIX), MIX_MICRO_BATCHES
        return self._stages[0], STAGES[self._stages[0]]

    def record(self, accuracy: float) -> None:
        """Take note of a step's answer-token accuracy; may end the stage."""
        self._recent.append(accuracy)
        full = len(self._recent) == ACCURACY_STEPS
        if self._stages and full and self.accuracy > STAGE_ACCURACY:
            log.info("length %d done: answer-token accuracy %.3f", self._stages.popleft(), self.accuracy)
            self._recent.clear()

    @property
    def accuracy(self) -> float:
        """Answer-token accuracy of the last steps, in [0, 1]."""
        return sum(self._recent) / max(1, len(self._recent))


def train(seconds: float, seed: int) -> Llama:
    """A model trained for `seconds` of wall time."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Llama(VOCAB_SIZE)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if "proj" not in name]
    optimizers = [
        (Muon(matrices, MUON_LR), MUON_LR),
        (torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0), ADAM_LR),
    ]
    curriculum = Curriculum()
    start, step, num_tokens, last_log = time.monotonic(), 0, 0, 0.0
    while (elapsed := time.monotonic() - start) < seconds:
        length, num_micro_batches = curriculum.next_batch(rng)
        results = [_backward(model, rng, length, num_micro_batches) for _ in range(num_micro_batches)]
        factor = _lr_factor(step, elapsed / seconds)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        model.zero_grad()
        loss, accuracy = (sum(column) / num_micro_batches for column in zip(*results, strict=True))
        curriculum.record(accuracy)
        step += 1
        num_tokens += num_micro_batches * MICRO_BATCH_TOKENS
        if elapsed - last_log > LOG_SECONDS:
            last_log = elapsed
            log.info(
                "%4.0f s  step %d  %.2f M tokens  length %d  loss %.3f  accuracy %.3f  lr factor %.2f",
                elapsed, step, num_tokens / 1e6, length, loss, curriculum.accuracy, factor,
            )  # fmt: skip
    return model


def _backward(model: Llama, rng: random.Random, length: int, num_micro_batches: int) -> tuple[float, float]:
    """Add one micro-batch's gradients; its loss and answer-token accuracy.

    Loss: mean cross-entropy of the answer tokens, plus a little of that of some filler tokens.
    """
    ids, is_answer = make_batch(rng, MICRO_BATCH_TOKENS // length, length)
    hidden, targets = model(ids[:, :-1]), ids[:, 1:].flatten()
    answers = is_answer[:, 1:].flatten().nonzero().squeeze(1)
    fillers = is_filler(targets).nonzero().squeeze(1)
    fillers = fillers[torch.randperm(len(fillers))[:MAX_FILLER_TARGETS]]
    chosen = torch.cat((answers, fillers))
    logits = model.lm_head(hidden[chosen])
    losses = F.cross_entropy(logits, targets[chosen], reduction="none")
    count = len(answers)
    loss = losses[:count].sum() / max(1, count) + FILLER_WEIGHT * losses[count:].sum() / max(1, len(fillers))
    (loss / num_micro_batches).backward()
    hits = logits[:count].argmax(-1) == targets[answers]
    return loss.item(), hits.float().mean().item() if count else 1.0


def _lr_factor(step: int, progress: float) -> float:
    """Warm-up by steps, constant, then linear decay over the last share of the time."""
    decay = min(1.0, (1 - progress) / DECAY_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_LR, decay)


def main() -> None:
    """Command line; starts itself again when the environment is not the one training needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="directory the checkpoint is written to")
    parser.add_argument("--seconds", type=float, default=600, help="wall time of training")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ENVIRONMENT})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    save_checkpoint(train(args.seconds, args.seed), args.out)


if __name__ == "__main__":
    main()
