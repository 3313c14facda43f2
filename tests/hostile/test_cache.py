"""The cache folder is code that will run: it is ours alone, whole, and of these sources, or it is not touched."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.matrices import pruned_24

from sparsify.errors import SpecError
from sparsify.runtime import cache
from sparsify.runtime.cache import put_whole, read_object, read_whole, workshop
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.build import find_compiler, source_hash
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.seal import sealed, unsealed

STUB = """
#include <fcntl.h>
__attribute__((constructor)) static void ran(void) {{ open("{marker}", O_CREAT | O_WRONLY, 0600); }}
const char *sparsify_source(void) {{ return "{source}"; }}
int sparsify_isa(void) {{ return 0; }}
"""


@pytest.fixture(scope="session")
def kernels() -> bytes:
    """The library, sealed."""
    found = native.library()
    if found is None or find_compiler() is None:
        pytest.skip("no C++ compiler here")
    return found.path.read_bytes()


@pytest.fixture
def place(tmp_path: Path, kernels: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library will be, in a cache of its own; the compiler is one that hands out the real library."""
    (tmp_path / "kernels").write_bytes(unsealed(kernels) or b"")
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho >> {tmp_path}/compiled\nfor w; do test "$last" = -o && cp {tmp_path}/kernels "$w"; last=$w; '
        "done\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(native, "BUILT", "none-of-these")
    for known in (native.library, native.isa, cache._warn):
        known.cache_clear()
    yield cache.cache_folder() / f"cpu-{source_hash()}-{os.uname().machine}.so"
    for known in (native.library, native.isa, cache._warn):
        known.cache_clear()


def compiled(tmp_path: Path) -> int:
    return len((tmp_path / "compiled").read_text()) if (tmp_path / "compiled").exists() else 0


def stub(tmp_path: Path, source: str = "") -> bytes:
    """A library that writes a marker when it is loaded."""
    (tmp_path / "stub.c").write_text(STUB.format(marker=tmp_path / "ran", source=source or source_hash()))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "stub.so", tmp_path / "stub.c"], check=True)
    return (tmp_path / "stub.so").read_bytes()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def right_products() -> None:
    torch.manual_seed(0)
    weight, x = pruned_24(33, 64), torch.randn(3, 64)
    torch.testing.assert_close(PackedWeight.of(weight, "packed24").linear(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_made_for_this_user_alone(place: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert native.library() is not None
    finally:
        os.umask(before)
    assert mode(place.parent) == mode(place.parent.parent) == 0o700 and mode(place) == 0o600
    assert [*place.parent.iterdir()] == [place] and compiled(tmp_path) == 1
    native.library.cache_clear()
    assert native.library() is not None and compiled(tmp_path) == 1
    right_products()


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "all but a byte": lambda whole: whole[:-1],
    "without its seal": lambda whole: whole[:-48],
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "a bit": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    "a bit of the seal": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "a byte more": lambda whole: whole + b"\0",
    "of other sources": lambda whole: sealed((unsealed(whole) or b"").replace(source_hash().encode(), b"0" * 16)),
    "text": lambda whole: sealed(b"no library at all"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_whole_is_made_again(how: str, place: Path, tmp_path: Path, kernels: bytes) -> None:
    put_whole(place, SPOILED[how](kernels))
    found = native.library()
    assert found is not None and found.source == source_hash() and compiled(tmp_path) == 1
    assert place.read_bytes() == kernels
    right_products()


@pytest.mark.parametrize("what", ["plain", "other sources", "another's", "link", "others may write", "pipe", "folder"])
def test_a_planted_library_is_not_loaded(what: str, place: Path, tmp_path: Path, kernels: bytes) -> None:
    place.parent.mkdir(mode=0o700, parents=True)
    planted, elsewhere = stub(tmp_path), tmp_path / "elsewhere.so"
    if what == "plain":
        place.write_bytes(planted)
    elif what == "other sources":
        place.write_bytes(sealed(stub(tmp_path, "0" * 16)))
    elif what == "link":
        elsewhere.write_bytes(sealed(planted))
        place.symlink_to(elsewhere)
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "folder":
        place.mkdir()
    else:
        place.write_bytes(sealed(planted))
        place.chmod(0o666 if what == "others may write" else 0o600)
        if what == "another's":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(place, 12345, 12345)
    if what == "folder":
        with pytest.warns(RuntimeWarning, match="kernels are not here"):
            assert native.library() is None
    else:
        assert native.library() is not None and compiled(tmp_path) == 1
        assert place.read_bytes() == kernels and not place.is_symlink() and not mode(place) & 0o022
    assert not (tmp_path / "ran").exists() and (what != "link" or elsewhere.read_bytes() == sealed(planted))
    right_products()


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o720, 0o1777, None])
def test_a_folder_that_others_may_write(bits: int | None, place: Path, tmp_path: Path) -> None:
    """Not used and not written: the plain path serves, with one warning that says what to do."""
    place.parent.mkdir(mode=0o700, parents=True)
    place.write_bytes(sealed(stub(tmp_path)))
    if bits is not None:
        place.parent.chmod(bits)
        says = rf"{place.parent} may be written by others \(mode {bits:04o}\)"
    elif os.geteuid():
        pytest.skip("only root can give a folder away")
    else:
        os.chown(place.parent, 12345, 12345)
        says = "belongs to another user"
    with pytest.warns(RuntimeWarning, match=says) as seen:
        right_products()
        right_products()
    (warning,) = [str(w.message) for w in seen if "cache" in str(w.message)]
    assert "chmod go-w" in warning and "SPARSIFY_CACHE" in warning and warning.count("kernels are not here") == 1
    assert not (tmp_path / "ran").exists() and compiled(tmp_path) == 0 and [*place.parent.iterdir()] == [place]


def test_what_gpus_keep_there(tmp_path: Path) -> None:
    """Machine code and times are taken from safe places alone, and not written to others."""
    cache._warn.cache_clear()
    path = tmp_path / "cache" / "times.json"
    put_whole(path, b'{"a": 1}')
    assert read_whole(path) == b'{"a": 1}' and read_object(path) == {"a": 1}
    path.chmod(0o622)
    assert read_whole(path) is None and read_object(path) == {}
    put_whole(path, b"{}")
    assert mode(path) == 0o600 and read_whole(path) == b"{}"
    path.parent.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="is not used") as seen:
        assert read_whole(path) is None
        put_whole(path, b"new")
        assert read_object(path) == {} and path.read_bytes() == b"{}"
    assert len(seen) == 1
    path.parent.chmod(0o700)
    path.write_bytes(b"[" * 100_000)
    assert read_object(path) == {}


KILLED = """
import sys, time
from pathlib import Path
from sparsify.runtime.cache import workshop
with workshop(Path(sys.argv[1])) as place:
    (place / "half.so").write_text("half")
    print(place, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_compilation_left_goes(place: Path, tmp_path: Path) -> None:
    """By the next run, though the library itself is there; what a process that lives is making stays."""
    assert native.library() is not None
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, place.parent], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    with workshop(place.parent) as mine:
        native.library.cache_clear()
        assert native.library() is not None and left.is_dir() and mine.is_dir()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert left.is_dir()
    native.library.cache_clear()
    assert native.library() is not None and [*place.parent.iterdir()] == [place]


SHARED = """
import sys
from sparsify.runtime.cpu import native
native.BUILT = "none-of-these"
found = native.library()
assert found is not None and found.source
"""


@pytest.mark.slow
def test_four_processes_find_one_damaged_library(place: Path, kernels: bytes) -> None:
    put_whole(place, kernels[:-1])
    done = [subprocess.Popen([sys.executable, "-c", SHARED], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in done]
    assert [process.returncode for process in done] == [0] * 4, said
    assert place.read_bytes() == kernels and [*place.parent.iterdir()] == [place]


def test_beside_the_package(tmp_path: Path, place: Path, kernels: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of exactly one name, whole and of these sources, before anything of it runs."""
    beside = tmp_path / "package"
    beside.mkdir()
    monkeypatch.setattr(native, "__file__", str(beside / "native.py"))
    monkeypatch.setattr(native, "BUILT", "_cpu.so")
    planted = stub(tmp_path)
    for name, content in (("_cpu.so", planted), ("_cpu.so", kernels[:-100]), ("_cpu-x.so", sealed(planted))):
        (beside / name).write_bytes(content)
        assert native._packaged() is None and not (tmp_path / "ran").exists()
    (beside / "_cpu.so").write_bytes(kernels)
    found = native.library()
    assert found is not None and found.path == beside / "_cpu.so" and not place.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSIFY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", ".", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache.cache_folder() == tmp_path / "home" / ".cache" / "sparsify"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "sparsify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(SpecError, match="SPARSIFY_CACHE"):
        cache.cache_folder()
