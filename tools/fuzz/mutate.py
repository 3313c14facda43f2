"""Bytes and JSON made wrong, by a random generator that is given: the same seed makes the same wrong."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

# Replaced in the text: json.dumps itself gives up on such.
_DEEP = "@deep@"
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**30, 0.5, -0.0, 1e308, 1e-308,
    float("nan"), float("inf"), "", "a", "0", "float32", "\x1b[31mred\x1b[0m", "\u202egnp", "[/b]", "[bold]", "\ud800",
    "\0", "../x", "/etc/passwd", "x" * 300, "é" * 200, [], {}, [[]], [None], {"": None}, [1, 2, 3], _DEEP,
)  # fmt: skip


def spoil_bytes(content: bytes, random: Random) -> bytes:
    """``content`` with bits turned, bytes replaced, cut, doubled, moved or added."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        at = random.randrange(len(data) + 1)
        length = min(len(data) - at, random.choice((1, 2, 4, 8, 64, 4096)))
        how = random.randrange(8)
        if how <= 2 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif how == 3:
            data[at : at + length] = random.randbytes(length)
        elif how == 4:
            data[at : at + length] = bytes([random.choice((0, 0xFF, 0x7F, 0x80))]) * length
        elif how == 5:
            del data[at : random.choice((len(data), at + length))]
        elif how == 6:
            data[at:at] = data[at : at + length]
        else:
            data += random.randbytes(length)
    return bytes(data)


def spoil_json(content: Any, random: Random) -> str:
    """The text of ``content`` with one to three of its values, keys or brackets wrong."""
    holder = [json.loads(json.dumps(content))]
    for _ in range(random.choice((1, 1, 2, 3))):
        _spoil_one(holder, random)
    text = json.dumps(holder[0])
    depth = random.choice((30, 300, 3000, 200000))
    deep = random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    text = text.replace(json.dumps(_DEEP), deep)
    if random.random() < 0.1:
        text = text.replace("1", "1" * random.choice((20, 400, 5000)), 1)
    if random.random() < 0.1:
        text = spoil_bytes(text.encode(), random).decode("utf-8", "ignore")
    return text


def _spoil_one(holder: list[Any], random: Random) -> None:
    """Go down to a random place, and change it there."""
    place: Any = holder
    key: Any = 0
    while isinstance(place[key], (dict, list)) and place[key] and random.random() < 0.85:
        place = place[key]
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
    how = random.randrange(6)
    if how == 0 and place is not holder:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[str(random.choice(STRANGE))[:300]] = place.pop(key)
    elif how == 2 and isinstance(place, list) and place is not holder:
        place += [place[key]] * random.choice((1, 3, 1000))
    elif how == 3 and isinstance(place[key], (int, float)):
        place[key] = random.choice((place[key] + 1, -place[key], place[key] * 2, place[key] * 10**9, str(place[key])))
    else:
        place[key] = random.choice(STRANGE)


def spoil_file(path: Path, random: Random) -> None:
    """Spoil the file ``path`` as bytes, or take it away."""
    if random.random() < 0.03:
        path.unlink()
        return
    path.write_bytes(spoil_bytes(path.read_bytes(), random))


def spoil_json_file(path: Path, random: Random) -> None:
    """Spoil the JSON file ``path``: its values mostly, its bytes at times."""
    if random.random() < 0.1:
        spoil_file(path, random)
        return
    text = spoil_json(json.loads(path.read_text(encoding="utf-8")), random)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def spoil_safetensors(path: Path, random: Random) -> None:
    """Spoil a safetensors file: its header's JSON, the header's length, or any bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    how = random.randrange(4)
    if how == 0:
        spoil_file(path, random)
        return
    if how == 1:
        wrong = random.choice((0, 1, length - 1, length + 1, len(content), 1 << 40, (1 << 64) - 1))
        path.write_bytes(wrong.to_bytes(8, "little") + header + data)
        return
    if how == 2:
        header = spoil_bytes(header, random)
    else:
        header = spoil_json(json.loads(header), random).encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
