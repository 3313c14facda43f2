"""A config of any class made tiny: its defaults with every size reduced by what its name says."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from breadth.exceptions import MROPE, SIZES
from breadth.kinds import config_class
from breadth.rules import HEAD, HEADS, LAYERS, VOCABULARY, WIDTH, size_of

# Ids that a text may hold: below them are begin, end and padding, above them images, sounds and the like.
FIRST_ID, LAST_ID = 8, 96

_TOKEN = re.compile(
    r".*(token_ids?|token_index|token_indices|_token|token_id_.*|pad_idx|padding_idx)|image_token|(bos|eos|pad|sep|cls|unk|mask|start|end)_(index|token_id)|.*_id|.*_tokens?_id(s)?"
)
_PERIOD = re.compile(r".*(period|interval|_every_n_layers|every|frequency|_step|pattern|freq)")
_OFFSET = re.compile(r".*_offset")
_PLACES = re.compile(r".*(_idxs|indices|indexes|_idx|_layer_ids|_layers|layer_idx|_index|_layer)|global_layers")
_BASE = {"id2label", "label2id", "dtype", "architectures", "transformers_version"}


# What a config that does not say it leaves to nobody, or derives in a way that only its own sizes allow.
UNSAID = {"head_dim": HEAD, "num_experts_per_tok": 2}


class Shrinker:
    """Makes one tree of configs tiny; ``left`` names whole numbers that no rule knew and that are large."""

    def __init__(self, kind: str) -> None:
        self.kind, self.ids, self.left = kind, dict[int, int](), list[str]()

    def config(self, cls: Any, default: Any | None = None, more: dict[str, Any] | None = None) -> Any:
        """A tiny config of ``cls``; of ``default``'s values where that is given, and ``more`` in the place of some."""
        own = SIZES.get(getattr(cls, "model_type", ""), {}) | (more or {})
        first = {k: v for k, v in own.items() if k in _fields(cls)}
        for name, other in ((k.removesuffix(":model"), v) for k, v in own.items() if k.endswith(":model")):
            model, sizes = other if isinstance(other, tuple) else (other, None)
            first[name] = self.config(config_class(model), more=sizes)
        if default is None:
            default = self._default(cls)
        values: dict[str, Any] = {}
        kept = self._chosen_layers(default)
        for name in _fields(cls):
            if name == "_out_indices" and _is_list(places := _get(default, "out_indices")):
                # Which stages a backbone gives, where their number stays.
                if _is_list(_get(default, "depths")):
                    values["out_indices"] = list(places)
                continue
            if name in _BASE or name.startswith("_"):
                continue
            value = _get(default, name)
            if name in first:
                part = type(value) if hasattr(value, "to_dict") else self._sub(cls, name)
                if part is not None and isinstance(first[name], dict):
                    values[name] = self.config(part, value, first[name])
                else:
                    values[name] = first[name]
                continue
            if value is None or isinstance(value, (bool, str, float)):
                if value is None and self._sub(cls, name) is not None:
                    values[name] = self.config(self._sub(cls, name))
                elif value is None and name in UNSAID:
                    values[name] = UNSAID[name]
                elif value is not None:
                    values[name] = value
                continue
            values[name] = self._value(name, value, default, kept)
        if cls.model_type in MROPE:
            rope = values["rope_parameters"]
            for own_rope in [v for v in rope.values() if isinstance(v, dict)] or [rope]:
                half = int(HEAD * own_rope.get("partial_rotary_factor", 1)) // 2
                own_rope["mrope_section"] = MROPE[cls.model_type][half]
        return cls(**values | {k[1:]: v for k, v in own.items() if k.startswith("+")})

    def _default(self, cls: Any) -> Any:
        try:
            return cls()
        except Exception:
            subs = {n: self.config(c) for n in getattr(cls, "sub_configs", {}) if (c := self._sub(cls, n)) is not None}
            own = {k: v for k, v in SIZES.get(cls.model_type, {}).items() if k in _fields(cls)}
            return cls(**subs, **{k: v for k, v in own.items() if k not in subs})

    def _sub(self, cls: Any, name: str) -> Any:
        """The class of a sub-config that the default config has not."""
        named = SIZES.get(cls.model_type, {}).get(f"{name}:class")
        if named is not None:
            return config_class(named)
        sub = getattr(cls, "sub_configs", {}).get(name)
        return None if sub is None or sub.__name__ == "AutoConfig" else sub

    def _chosen_layers(self, config: Any) -> dict[int, list[int]]:
        """Per number of layers that the config has: which to keep, so that each kind of layer is still there."""
        chosen: dict[int, list[int]] = {}
        for name in _fields(type(config)):
            count = _get(config, name)
            if not (_is_int(count) and count > 1 and size_of(name) == LAYERS):
                continue
            lists = [
                v
                for n in _fields(type(config))
                if _is_list(v := _get(config, n))
                and len(v) == count
                and not n.startswith("stage_")
                and not n.endswith("_out_features")
            ]
            kept: list[int] = []
            seen: set[Any] = set()
            for at in range(count):
                key = tuple(str(v[at]) for v in lists)
                if lists and key not in seen and len(kept) < 4:
                    seen.add(key)
                    kept.append(at)
            for at in range(count):
                if len(kept) >= min(LAYERS, count):
                    break
                if at not in kept:
                    kept.append(at)
            # A model's last layers share what earlier ones of their kind keep: the order stays.
            chosen[count] = sorted(kept)
        return chosen

    def _value(self, name: str, value: Any, config: Any, kept: dict[int, list[int]]) -> Any:
        if hasattr(value, "to_dict"):
            return self.config(type(value), value)
        if isinstance(value, dict):
            return self._table(name, value, config, kept)
        if _is_list(value):
            return self._list(name, list(value), config, kept)
        if not _is_int(value):
            return value
        if _TOKEN.fullmatch(name) and size_of(name) is None:
            return self._id(value)
        if value in kept and size_of(name) == LAYERS:
            return len(kept[value])
        if _PERIOD.fullmatch(name):
            return min(value, 2)
        if _OFFSET.fullmatch(name):
            return min(value, 1)
        if _PLACES.fullmatch(name) and size_of(name) is None:
            return min(value, 1)
        return self._number(name, value, config)

    def _number(self, name: str, value: int, config: Any) -> int:
        rule = size_of(name)
        if rule is None:
            if value > 256:
                self.left.append(f"{name}={value}")
            return value
        if rule == "kv":
            heads = _get(config, "num_attention_heads") or _get(config, "num_heads")
            return min(value, HEADS if value == heads else 2)
        if rule == "image":
            return min(value, 64 if _is_list(_get(config, "depths")) else 32)
        if rule == "patch":
            return min(value, 8)
        if rule == WIDTH and name == "embed_dim" and _is_list(_get(config, "num_heads")):
            return HEAD * _get(config, "num_heads")[0]
        if value < 0:
            return value
        return min(value, rule)

    def _list(self, name: str, value: list[Any], config: Any, kept: dict[int, list[int]]) -> Any:
        if _TOKEN.fullmatch(name) and all(_is_int(v) for v in value):
            return [self._id(v) for v in value]
        if (
            len(value) in kept
            and not name.startswith("stage_")
            and not name.endswith(("_out_features", "_out_indices"))
        ):
            count = len(value)
            numbers = [value[at] for at in kept[count]]
            return [self._number(name, v, config) if _is_int(v) else v for v in numbers]
        if name in ("out_indices", "out_features"):
            return (
                value
                if _is_list(_get(config, "depths")) or not all(_is_int(v) for v in value)
                else [min(v, 1) for v in value]
            )
        if name.startswith("stage_") and all(_is_int(v) for v in value):
            return _narrower(value) if "channels" in name else [min(v, 2) for v in value]
        if all(_is_int(v) for v in value) and value:
            if name == "depth" or name.endswith("depths") or name in ("num_blocks", "layers"):
                return [min(v, 2) if len(value) < 3 else 1 + (at == 0 and v > 1) for at, v in enumerate(value)]
            if _PLACES.fullmatch(name) and size_of(name) in (None, LAYERS):
                return [1] if len(value) == 1 or min(value) > 0 else [0]
            rule = size_of(name)
            if rule in ("image", "patch"):
                return [self._number(name, v, config) for v in value]
            if rule == WIDTH or "hidden_sizes" in name or "embed" in name or "dims" in name or "channels" in name:
                return _narrower(value)
            if isinstance(rule, int) and rule not in (HEADS,):
                return [min(v, rule) for v in value]
        if value and all(hasattr(v, "to_dict") for v in value):
            return [self.config(type(v), v) for v in value]
        if value and all(_is_list(v) for v in value):
            return [self._list(name, list(v), config, kept) for v in value]
        return value

    def _table(self, name: str, value: dict[str, Any], config: Any, kept: dict[int, list[int]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, each in value.items():
            if key == "mrope_section":
                made[key] = [HEAD // 2 - 2, 1, 1] if len(each) == 3 else [2] * len(each)
            elif key == "partial_rotary_factor":
                made[key] = 1.0 if each == 1 else 0.5
            elif key in ("long_factor", "short_factor"):
                made[key] = each[: HEAD // 2]
            elif isinstance(each, dict):
                made[key] = self._table(name, each, config, kept)
            elif isinstance(each, bool) or not (_is_int(each) or _is_list(each)) or name.startswith("rope"):
                made[key] = each
            else:
                made[key] = self._value(str(key), each, config, kept)
        return made

    def _id(self, value: int) -> int:
        if 0 <= value < FIRST_ID or value < 0:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids))


def tiny_config(kind: str) -> tuple[Any, list[str]]:
    """A tiny config of a model type, and large numbers in it that no rule knew."""
    shrinker = Shrinker(kind)
    return shrinker.config(config_class(kind)), shrinker.left


def _fields(cls: Any) -> list[str]:
    if not dataclasses.is_dataclass(cls):
        return []
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _get(config: Any, name: str) -> Any:
    """A field's value; of one that differs from layer to layer that of the config as a whole."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name, None)


def _narrower(values: list[int]) -> list[int]:
    """Widths in the same proportions, as far as the smallest stays a multiple of eight."""
    factor = max((f for f in (16, 8, 4, 2, 1) if all(v % f == 0 and (v // f) % 8 == 0 for v in values)), default=1)
    return [v // factor for v in values]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
