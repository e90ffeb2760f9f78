"""A small random vision-language checkpoint, its pictures, and the rows its decoder sees in their place.

A prompt with pictures is a sequence of integers as any other. A token below 0 stands for one row of a picture: -1 for
the first row of the first one, and so on; `picture` gives all rows of one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tests.reference.checkpoints import randomise

IMAGE_FAMILY = "idefics3"
NUM_PICTURES = 3
_SIDE, _PATCH, _SCALE = 160, 8, 2  # pixels, pixels, patches that become one row, each way
_NUM_FEATURES = (_SIDE // _PATCH // _SCALE) ** 2
_IMAGE, _AROUND, _GLOBAL = 3, 508, 509
# What a picture is to the decoder: two marks, its own rows, a mark.
ROW_TOKENS = (_AROUND, _GLOBAL, *[_IMAGE] * _NUM_FEATURES, _AROUND)
NUM_ROWS = len(ROW_TOKENS)
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_TEXT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)


def make_image_checkpoint(directory: Path, seed: int = 0) -> Path:
    """Write a random Idefics3 checkpoint with a Llama decoder, its tokenizer and its processor; return the directory.

    Token i is the word "w<i>"; the decoder is of the size of `make_checkpoint`'s llama.
    """
    config = Idefics3Config(
        vision_config=_VISION,
        text_config=_TEXT,
        image_token_id=_IMAGE,
        scale_factor=_SCALE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config)
    randomise(model, seed)
    model.save_pretrained(directory)
    _make_processor().save_pretrained(directory)
    return Path(directory)


def _make_processor() -> Idefics3Processor:
    words = ["<pad>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(4, 508))]
    words += ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": _SIDE}, max_image_size={"longest_edge": _SIDE}, do_image_splitting=False
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<image>", *words[508:511]],
        ),
        image_seq_len=_NUM_FEATURES,
        chat_template=_CHAT,
    )


def pixels(number: int) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(number).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def picture(number: int) -> tuple[int, ...]:
    """Tokens for all rows of a picture."""
    first = number * NUM_ROWS
    return tuple(-1 - row for row in range(first, first + NUM_ROWS))


@torch.inference_mode()
def image_rows(directory: Path) -> Tensor:
    """What the decoder sees of all pictures, marks around them included, [NUM_PICTURES * NUM_ROWS, hidden] float32.

    Transformers' own processor, vision tower and connector.
    """
    model = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = Idefics3ImageProcessorPil.from_pretrained(directory)
    embedding = model.model.text_model.embed_tokens.weight
    rows = []
    for number in range(NUM_PICTURES):
        inputs = processor([[pixels(number)]], input_data_format="channels_last", return_tensors="pt")
        features = model.model.get_image_features(**inputs).pooler_output
        rows += [embedding[[_AROUND, _GLOBAL]], features.flatten(0, 1), embedding[[_AROUND]]]
    return torch.cat(rows)


def num_after_image(prompt: Sequence[int]) -> int:
    """Tokens that follow the last row of a picture itself; 0 without one. The mark behind it is a token like others."""
    features = [i for i, token in enumerate(prompt) if token < 0 and ROW_TOKENS[(-1 - token) % NUM_ROWS] == _IMAGE]
    return len(prompt) - 1 - features[-1] if features else 0


def engine_prompt(prompt: Sequence[int]) -> dict[str, Any]:
    """The same for vLLM: one image token in the place of each picture, and the pictures."""
    starts = {picture(number)[0]: number for number in range(NUM_PICTURES)}
    tokens = [_IMAGE if token in starts else token for token in prompt if token >= 0 or token in starts]
    images = [pixels(starts[token]) for token in prompt if token in starts]
    return {"prompt_token_ids": tokens} | ({"multi_modal_data": {"image": images}} if images else {})
