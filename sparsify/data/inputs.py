"""What a model is given: names and shapes of its inputs, how long sequences may be, and how many run at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from inspect import signature

import torch
from torch import Tensor

from sparsify.errors import CalibrationError, CheckpointError, SpecError
from sparsify.frontend.source import Source
from sparsify.frontend.tables import position_table
from sparsify.frontend.text_config import text_config
from sparsify.words import check_amount

# Tokens that run through the graph at once: enough to keep the matrix products busy, few enough for the cache.
TOKENS_AT_ONCE = 2048
# Sequences are no longer than this where nobody says otherwise: as in the papers.
USUAL = 2048
# An image is some 200 patches.
IMAGE_TOKENS = 256


def as_inputs(ids: Tensor, source: Source) -> dict[str, Tensor]:
    """Token ids as the keyword inputs of the model; a decoder beside an encoder reads the same text."""
    inputs, taken = {"input_ids": ids}, signature(source.module.forward).parameters
    # Of a detector that reads text the word in its config means its own queries.
    if getattr(source.config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        start = getattr(source.config, "decoder_start_token_id", None) or 0
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    both_ways = getattr(text_config(source.config), "use_bidirectional_attention", False)
    if both_ways and "token_type_ids" in taken:
        # PaliGemma: a prompt is read in both directions, which its processor says with zeros; without them it depends
        # on how attention is computed.
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def reads_images(source: Source) -> bool:
    """Whether the model reads images beside text, and a processor for both lies beside it."""
    config, folder = source.config, source.folder
    if folder is None or getattr(config, "vision_config", None) is None:
        return False
    return getattr(source.module, "main_input_name", None) == "input_ids"


def default_length(source: Source, most: int = USUAL) -> int:
    """The length of sequences where nobody says: ``most`` tokens, or as many as the model has positions for."""
    table = position_table(source)
    limits = (source.context_length, None if table is None else table.tokens)
    return min([most, *(limit for limit in limits if limit is not None)])


def check_length(length: int | None, source: Source) -> None:
    """Raises:
    SpecError: sequences of fewer than two tokens, or of more than the model has positions for.
    """
    check_amount(None, length)
    if length is None:
        return
    check_table(length, source)
    most = source.context_length
    if most is not None and length > most:
        raise SpecError(
            f"sequence length {length}",
            found=f"the context of {source.name} is {most} tokens (config.json)",
            do=f"Give at most {most}",
        )


def check_table(length: int, source: Source) -> None:
    """Raises:
    SpecError: more tokens than a learned table has positions for; past it there is nothing to look up.
    """
    table = position_table(source)
    if table is not None and length > table.tokens:
        fits = min(table.tokens, source.context_length or table.tokens)
        raise SpecError(f"sequence length {length}", found=f"{table} ({source.name})", do=f"Give at most {fits}")


def warn_of_length(length: int, source: Source) -> None:
    """Say that sequences which nobody cuts are longer than what the model was made for; it runs all the same."""
    most = source.context_length
    if most is not None and length > most:
        warnings.warn(
            f"sequences of {length} tokens, and the context of {source.name} is {most} tokens (config.json): past it a "
            "model predicts badly, and what is measured there says little",
            stacklevel=2,
        )


def one_row_alone(source: Source) -> bool:
    """Whether the model takes one sequence at a time alone: a classifier or reward model of causal blocks finds the
    last token of each of several by the padding behind it, and refuses them where its config names no padding."""
    config = source.config
    if config is None or getattr(source.module, "main_input_name", None) != "input_ids":
        return False
    text = text_config(config)
    if getattr(config, "pad_token_id", None) is not None or getattr(text, "pad_token_id", None) is not None:
        return False
    kinds = [kind.__name__ for kind in type(source.module).__mro__]
    return any("ForSequenceClassification" in kind or "Reward" in kind for kind in kinds)


def rows_to_batches(rows: Mapping[str, Tensor], *, whole: bool) -> list[dict[str, Tensor]]:
    """Equal batches of rows: as many at once as TOKENS_AT_ONCE allows and divides them."""
    first = next(iter(rows.values()))
    count = len(first)
    # What other inputs are worth is unknown.
    other = IMAGE_TOKENS if "pixel_values" in rows else TOKENS_AT_ONCE
    size = rows_at_once(count, first.shape[1] if whole and first.dim() == 2 else other)
    return [{n: t[i : i + size].contiguous() for n, t in rows.items()} for i in range(0, count, size)]


def rows_at_once(count: int, tokens: int) -> int:
    """How many of ``count`` rows of ``tokens`` each run at once: as many as TOKENS_AT_ONCE allows and divide them."""
    most = max(1, TOKENS_AT_ONCE // tokens)
    return max(d for d in range(1, min(most, count) + 1) if count % d == 0)


def fewer_rows(rows: int, most: int | None) -> int:
    """The largest number up to ``most`` that divides ``rows``; ``rows`` where ``most`` is None."""
    return rows if most is None else max(d for d in range(1, min(most, rows) + 1) if rows % d == 0)


def split_rows(batches: list[dict[str, Tensor]], most: int = 1) -> list[dict[str, Tensor]]:
    """Batches of at most so many rows each: of one, as gradients per sample and classifiers without padding need them.

    Raises:
        CalibrationError: inputs that do not share their first axis.
    """
    fewer = []
    all_rows = {len(t) for batch in batches for t in batch.values()}
    size = fewer_rows(math.gcd(*all_rows), most)
    for batch in batches:
        rows = {len(t) for t in batch.values()}
        if len(rows) > 1:
            raise CalibrationError(
                "one sample at a time",
                found=f"inputs whose first axes differ: {sorted(rows)}",
                do="Give batches whose inputs all have one row per sample",
            )
        fewer += [{n: t[i : i + size].contiguous() for n, t in batch.items()} for i in range(0, rows.pop(), size)]
    return fewer


def outside(token: int, where: str, source: Source) -> CalibrationError:
    """The error for a token id that the model has no embedding for, below 0 or past its vocabulary."""
    asked = f"token id {token} of {where}"
    if token < 0:
        do = "Ids count from 0. Of padding give the padding token's, with 0 in an attention_mask; -100 is of labels"
        return CalibrationError(asked, found="a negative number, which is no token's id", do=do)
    size = f"the model's vocabulary has {source.vocab_size} tokens"
    try:
        tokenizer = source.tokenizer()
        known = len(tokenizer)
        text = tokenizer.convert_ids_to_tokens(token) if token < known else None
    except CheckpointError:
        text = None
    if text is None:
        return CalibrationError(
            asked, found=size, do="The ids are of another tokenizer; give text, or ids of this model's"
        )
    return CalibrationError(
        asked,
        found=f"{size}, and its own tokenizer has {known}: this id is its token {text!r}",
        do="Take that token out of the data, or mend the folder: another tokenizer, or as many embeddings as tokens",
    )


def are_ids(tensor: Tensor) -> bool:
    """Whether it holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
