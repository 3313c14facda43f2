"""Small tokenizers, made where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Roles and turns, as ChatML writes them; parts that are images stand as their placeholder.
CHATML = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] or [] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}"
    "</turn>{% endfor %}{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<turn>", "</turn>", "<image>")


def of_bytes(special: Sequence[str] = (), chat_template: str | None = CHATML, **options: Any) -> Any:
    """A tokenizer with a token for every byte, behind special ones: no text is unknown to it, 262 tokens and more."""
    known = [*_SPECIAL, *special]
    vocabulary = {token: number for number, token in enumerate([*known, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **(named | options))
    made.add_special_tokens({"additional_special_tokens": known[3:]})
    made.chat_template = chat_template
    return made
