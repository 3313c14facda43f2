"""What the emulator of the GPU finds, on kernels with planted faults: a proof by it is worth as much as this."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import emulate
from support.matrices import pruned_24
from torch import Tensor

from sparsify.runtime.cuda.fragments import to_fragments
from sparsify.runtime.cuda.variants import BULK, DECODE, TILED, Arguments, Launch, Variant
from sparsify.runtime.layout import pack

# A warp that brings 512 bytes of x to y through shared memory, by a bulk copy; FAULTS replaces parts of it.
SOUND = """
KERNEL(NAME, 32) {
  SHARED(shared);
  Signal* signal = (Signal*)(shared + 512);
  if (thread() == 0) { make_signal(signal); publish_signals(); }
  warp_barrier();
  await_previous();
  if (thread() == 0) { announce(signal, 512); copy_bulk(shared, a.x, 512, signal); }
  await_signal(signal, 0);
  const uint4 four = load_shared(shared + 16 * thread());
  u16 v[8];
  memcpy(v, &four, 16);
  for (int i = 0; i < 8; i++) store_half(a.y + 8 * thread() + i, v[i]);
}
"""
FAULTS = {
    "memory touched before the kernel before": ("await_previous();", ""),
    "a signal that nobody made": ("publish_signals();", ""),
    "threads wait for others that never come": ("announce(signal, 512)", "announce(signal, 496)"),
    "a phase announced twice": ("announce(signal, 512);", "announce(signal, 512); announce(signal, 512);"),
    "bulk copies that nobody awaited": ("await_signal(signal, 0);", "warp_barrier();"),
    "a bulk copy to where a load may still read": (
        "u16 v[8];",
        "u16 v[8]; warp_barrier(); if (thread() == 0) copy_bulk(shared, a.x, 512, signal);",
    ),
    "other than sixteens": ("a.x, 512, signal", "a.x, 500, signal"),
    "read outside of every buffer": ("a.x, 512, signal", "a.x + 8, 512, signal"),
    "write outside of every buffer": ("a.y + 8", "a.y - 8 + 8"),
    "off its boundary": ("(shared + 512)", "(shared + 516)"),
    "past its end": ("const uint4 four", "shared[520] = 0; const uint4 four"),
}


# All of them in one library: compiling is what takes the time.
KERNELS = {"sound": SOUND} | {f"fault{i}": SOUND.replace(*change) for i, change in enumerate(FAULTS.values())}
ALL = "".join(source.replace("NAME", name) for name, source in KERNELS.items())


def through_shared(name: str) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(256).bfloat16(), torch.zeros(256).bfloat16()
    arguments = Arguments(x=x.data_ptr(), y=y.data_ptr())
    emulate.run(Launch(name, (1, 1, 1), 32, 520), arguments, torch.bfloat16, [x], [y], more=ALL)
    return x, y


def test_the_sound_kernel_is_sound() -> None:
    x, y = through_shared("sound")
    assert torch.equal(x, y)


@pytest.mark.parametrize(("name", "said"), [(f"fault{i}", said) for i, said in enumerate(FAULTS)])
def test_each_fault_is_found(name: str, said: str) -> None:
    assert KERNELS[name] != SOUND
    with pytest.raises(emulate.EmulatorError, match=said):
        through_shared(name)


def weight() -> Tensor:
    return to_fragments(pack(pruned_24(32, 256, torch.bfloat16), "packed24"))


@pytest.mark.parametrize(
    ("tokens", "rows", "variant"), [(4, 16, DECODE[0]), (5, 32, DECODE[0]), (5, 32, TILED[0]), (4, 16, BULK[0])]
)
def test_kernels_that_are_told_of_more_than_there_is(tokens: int, rows: int, variant: Variant) -> None:
    """Of more rows of weights than there are, and of more tokens."""
    fragments = weight()[: rows // 16]
    x, y = torch.randn(4, 256).bfloat16(), torch.empty(4, 32, dtype=torch.bfloat16)
    arguments = Arguments(fragments.data_ptr(), x.data_ptr(), None, y.data_ptr(), None, tokens, 32, 256, 1, 1, 0, 0, 0)
    with pytest.raises(emulate.EmulatorError, match="outside of every buffer"):
        emulate.run(variant.launch(tokens, 32), arguments, torch.bfloat16, [fragments, x], [y])


@pytest.mark.parametrize("variant", [DECODE[0], BULK[0]], ids=lambda v: v.kind)
def test_shared_memory_that_is_too_small(variant: Variant) -> None:
    fragments, x, y = weight(), torch.randn(4, 256).bfloat16(), torch.empty(4, 32, dtype=torch.bfloat16)
    arguments = Arguments(fragments.data_ptr(), x.data_ptr(), None, y.data_ptr(), None, 4, 32, 256, 1, 1, 0, 0, 0)
    launch = variant.launch(4, 32)
    short = replace(launch, shared=launch.shared - 16)
    with pytest.raises(emulate.EmulatorError, match="past its end"):
        emulate.run(short, arguments, torch.bfloat16, [fragments, x], [y])


def test_a_split_without_its_cluster() -> None:
    fragments, x, y = weight(), torch.randn(4, 256).bfloat16(), torch.empty(4, 32, dtype=torch.bfloat16)
    arguments = Arguments(fragments.data_ptr(), x.data_ptr(), None, y.data_ptr(), None, 4, 32, 256, 1, 2, 0, 0, 0)
    launch = replace(DECODE[0], splits=2).launch(4, 32)
    with pytest.raises(emulate.EmulatorError, match="no such block in the cluster"):
        emulate.run(replace(launch, cluster=1), arguments, torch.bfloat16, [fragments, x], [y])
