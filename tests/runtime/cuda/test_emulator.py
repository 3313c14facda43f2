"""What the emulator of the GPU finds, on kernels with planted faults: a proof by it is worth as much as this."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import emulate
from support.matrices import error, pruned_24
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
    "an arrival at a phase that was full": ("announce(signal, 512);", "announce(signal, 512); arrive(signal);"),
    "other than sixteens": ("a.x, 512, signal", "a.x, 500, signal"),
    "read outside of every buffer": ("a.x, 512, signal", "a.x + 8, 512, signal"),
    "write outside of every buffer": ("a.y + 8", "a.y - 8 + 8"),
    "off its boundary": ("(shared + 512)", "(shared + 516)"),
    "past its end": ("const uint4 four", "shared[520] = 0; const uint4 four"),
}


# Four warps that multiply the first 32 columns of 64 rows and 64 tokens.
PRODUCT = """
KERNEL(NAME, 128) {
  SHARED(shared);
  unsigned char* inputs = shared + (1024 - (shared_address(shared) & 1023) & 1023);
  const int lane = thread() & 31, warp = thread() >> 5;
  await_previous();
  for (int i = thread(); i < 64 * 4; i += 128) {
    const int token = i / 4, unit = i % 4, at = (unit & 1) << 1 | unit >> 1;
    copy_async(inputs + token * 128 + ((at ^ (token & 7)) << 4), a.x + token * a.columns + unit * 8, true);
  }
  commit_copies(); await_copies<0>(); publish_writes();
  barrier();
  const uint4* tile = a.fragments + warp * TILE;
  uint4 values = load_weights(tile + other_lane(lane));
  const u32 codes = other_codes(load_weights(tile + 32 * CHUNKS + lane).x);
  u64 x = describe_inputs(inputs);
  float c[32] = {};
  begin_products();
  WarpgroupSparse<BFloat16, 0>::multiply(c, values, x, codes);
  commit_products();
  await_products<0>();
  for (int i = 0; i < 32; i++) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    store_half(a.y + token * 64 + row, BFloat16::narrow(c[i]));
  }
}
"""
DONE = "await_products<0>();"
PRODUCT_FAULTS = {
    "x that was not published": ("publish_writes();", ""),
    "that was not published": ("await_copies<0>(); publish_writes();", "publish_writes(); await_copies<0>();"),
    "a product without begin_products": ("begin_products();", ""),
    "products that were never awaited": (DONE, ""),
    "x written over while a product read it": (DONE, f"copy_async(inputs, a.x, true); commit_copies(); {DONE}"),
    "other than with a swizzle": ("describe_inputs(inputs)", "describe_inputs(inputs) & ~(3ull << 62)"),
    "lanes that ask for different products": ("describe_inputs(inputs)", "describe_inputs(inputs) + (lane == 3)"),
    "warps of four that ask for different": ("describe_inputs(inputs)", "describe_inputs(inputs) + 64 * (warp == 2)"),
    "x described outside of shared memory": ("describe_inputs(inputs)", "describe_inputs(inputs) + 4096"),
}
# These give other sums, as they do on a GPU.
OTHER_SUMS = {
    "a register that is written while a product reads it": (DONE, f"values.x = 0; {DONE}"),
    "sums that are read before they are there": (DONE, f"const float early = c[5]; {DONE} c[5] = early;"),
    "sixteen bytes that lie elsewhere": ("at ^ (token & 7)", "at ^ (token & 3)"),
    "a place off the boundary of 1024": ("& 1023) & 1023)", "& 1023) & 1023) + 128"),
}

# All of them in one library: compiling is what takes the time.
KERNELS = {"sound": SOUND} | {f"fault{i}": SOUND.replace(*change) for i, change in enumerate(FAULTS.values())}
PRODUCTS = {"product": PRODUCT} | {
    f"product_fault{i}": PRODUCT.replace(*change) for i, change in enumerate((PRODUCT_FAULTS | OTHER_SUMS).values())
}
KERNELS |= PRODUCTS
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


def product(name: str) -> float:
    """How far its sums are from the exact ones."""
    torch.manual_seed(0)
    dense, x = pruned_24(64, 256, torch.bfloat16), torch.randn(64, 256).bfloat16()
    y, fragments = torch.zeros(64, 64).bfloat16(), to_fragments(pack(dense, "packed24"))
    arguments = Arguments(fragments=fragments.data_ptr(), x=x.data_ptr(), y=y.data_ptr(), columns=256)
    launch = Launch(name, (1, 1, 1), 128, 1024 + (16 << 10))
    emulate.run(launch, arguments, torch.bfloat16, [fragments, x], [y], more=ALL)
    return error(y, x[:, :32].double() @ dense[:, :32].double().t())


def test_a_sound_product_is_sound() -> None:
    assert product("product") < 4e-3


@pytest.mark.parametrize(("name", "said"), [(f"product_fault{i}", said) for i, said in enumerate(PRODUCT_FAULTS)])
def test_each_fault_of_a_product_is_found(name: str, said: str) -> None:
    assert KERNELS[name] != PRODUCT
    with pytest.raises(emulate.EmulatorError, match=said):
        product(name)


@pytest.mark.parametrize("number", range(len(OTHER_SUMS)), ids=list(OTHER_SUMS))
def test_faults_of_a_product_that_only_its_sums_show(number: int) -> None:
    name = f"product_fault{len(PRODUCT_FAULTS) + number}"
    assert KERNELS[name] != PRODUCT
    # Not a number where x was never copied to.
    assert not product(name) < 4e-3


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
