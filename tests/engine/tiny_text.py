"""A tokenizer and models small enough to build in every test."""

import functools

import torch
from ppomax.default.texts import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "the film is a warm and funny story .",
    "the movie is dull , slow and far too long .",
    "a good cast and a bad script",
    "this picture never finds its way",
    "it's ( almost ) moving !",
] * 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def _tokenizer_json() -> str:
    return train_tokenizer(TEXTS, 320).backend_tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """About 320 tokens, BOS, EOS and pad apart; made as the default's is."""
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(vocab: int = 320, *, seed: int = 0, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    """Random Llama of width 32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
