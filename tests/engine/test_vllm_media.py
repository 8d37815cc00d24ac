"""Images on a real engine: blocks belong to the images that they were computed with."""

from __future__ import annotations

import pytest
from kit import LLAMA

pytestmark = pytest.mark.engine

OPTIONS = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 3}}
IMAGE = 3  # the placeholder token: 64 tokens and what stands around them


def write_idefics(folder):
    """An Idefics 3 of random weights: 64 tokens an image. Its processor needs no torchvision."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    names = ["<pad>", "<s>", "</s>", *special, "\n", "\n\n", "\n\n\n"]
    vocabulary = {name: number for number, name in enumerate(names)}
    vocabulary |= {f"w{number}": number for number in range(len(names), 512)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special,
    )
    vision = Idefics3VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        initializer_range=0.2,
    )
    text = LlamaConfig(**LLAMA)
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    Idefics3ForConditionalGeneration(config).float().save_pretrained(folder)
    edge = {"longest_edge": 224}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(images, fast, image_seq_len=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_idefics(tmp_path_factory.mktemp("idefics"))


@pytest.fixture(scope="module")
def images():
    import numpy as np
    from PIL import Image

    luck = np.random.default_rng(0)
    return [Image.fromarray(luck.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(3)]


def text(first, count):
    return [60 + (first + each * 7) % 450 for each in range(count)]


def prompt_of(media, ids=None):
    """40 tokens, an image of 67, 70 tokens, an image of 67, ...: each image spans blocks."""
    tokens = text(1, 40)
    for number in range(len(media)):
        tokens += [IMAGE, *text(100 + number, 70)]
    asked = {"prompt_token_ids": tokens, "multi_modal_data": {"image": media}}
    return asked | ({"multi_modal_uuids": {"image": ids}} if ids else {})


def ask(engine, *prompts):
    """Answer and tokens from kvstrata of each prompt; vLLM's own caches are empty before each."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers = []
    for prompt in prompts:
        engine.forget()
        (output,) = engine.llm.generate([prompt], parameters, use_tqdm=False)
        said = (output.kv_transfer_params or {}).get("kvstrata", {}).get("tokens_from", {})
        answers.append((tuple(output.outputs[0].token_ids), sum(said.values())))
        if engine.connector:
            engine.wait_idle()
    return answers


def test_each_image_finds_its_own_blocks(engine_on, model, images, tmp_path):
    one, two, three = images
    asked = [[one], [two], [one, two], [two, one], [one, three]]
    prompts = [prompt_of(media) for media in asked]
    with engine_on(model=model, **OPTIONS) as engine:
        right = [answer for answer, _ in ask(engine, *prompts)]
    assert len(set(right)) == len(right), "the images must change the answers"
    extra = {"tiers": f"host:64MiB,disk:{tmp_path}:64MiB"}
    with engine_on(extra, model=model, **OPTIONS) as engine:
        cold = ask(engine, *prompts)
        warm = ask(engine, *prompts)
        # A client's own name for an image is believed by nobody.
        named = ask(
            engine,
            prompt_of([three], ["mine"]),
            prompt_of([three], ["mine"]),
        )
    with engine_on(extra, model=model, **OPTIONS) as engine:
        lied = ask(engine, prompt_of([two], ["mine"]))
        again = ask(engine, prompts[3])
    # 177 and 314 tokens. Two prompts that begin with the same image share its blocks only.
    assert cold == list(zip(right, [0, 0, 128, 128, 128], strict=True))
    assert warm == list(zip(right, [128, 128, 256, 256, 256], strict=True))
    assert [kept for _, kept in named] == [0, 128]
    assert lied == [(right[1], 0)]
    assert again == [(right[3], 256)]
