"""Data: rows from files, data sets or memory, as token ids in the one format that every stage trains on."""

from ppomax.data.encode import check_same_vocabulary, check_tokenizer, encode_prompt, encode_response, end_ids
from ppomax.data.load import (
    Counts,
    Pair,
    PromptRow,
    Text,
    columns_of,
    load_pairs,
    load_prompt_rows,
    load_prompts,
    load_texts,
)
from ppomax.data.rows import DataError

__all__ = [
    "Counts",
    "DataError",
    "Pair",
    "PromptRow",
    "Text",
    "check_same_vocabulary",
    "check_tokenizer",
    "columns_of",
    "encode_prompt",
    "encode_response",
    "end_ids",
    "load_pairs",
    "load_prompt_rows",
    "load_prompts",
    "load_texts",
]
