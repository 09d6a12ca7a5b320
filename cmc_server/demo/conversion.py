"""From GGUF to a Hugging Face folder that vLLM serves, with what the conversion of the two models alone would lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A base model knows no roles: a chat is written as questions and answers, whatever else there is as plain text.
# The template writes <bos> itself, since chat prompts are encoded without special tokens.
GEMMA_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'Question: ' + message.content | trim + '\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Answer: ' + message.content | trim }}"
    "{% if not (loop.last and continue_final_message) %}{{ '\n\n' }}{% endif %}"
    "{% else %}{{ message.content | trim + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
GEMMA_END_OF_TURN = "<end_of_turn>"


def convert(name: str, gguf_file: Path, folder: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and chat template of a demo model into ``folder``.

    Args:
        name: ``smollm2`` or ``gemma3``.
        gguf_file: the quantized model.
        folder: an existing folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = _tokenizer(name, gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if name == "gemma3":
        model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids(GEMMA_END_OF_TURN),
        ]
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # save_pretrained leaves the weights readable by their owner only; a server may run as another user.
    for path in folder.iterdir():
        path.chmod(0o644)


def _tokenizer(name: str, gguf_file: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = loaded.backend_tokenizer
    if name == "smollm2":
        _split_digits(backend)
    else:
        _prepend_bos(backend, loaded.bos_token, loaded.bos_token_id)
    # The plain class, since a model's own class builds its tokenizer anew and drops what was changed here.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=loaded.chat_template or GEMMA_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **loaded.special_tokens_map,
    )


def _split_digits(backend: object) -> None:
    from tokenizers import pre_tokenizers

    # GGUF names SmolLM2's pre-tokenizer ("smollm": digits one by one, then GPT-2's); the loader knows only GPT-2's.
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _prepend_bos(backend: object, bos: str, bos_id: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
