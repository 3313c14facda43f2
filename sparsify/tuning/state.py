"""The state of a tuning run, kept beside its output until it is done: trained tensors and the optimizer's, no
pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsify.durable import aside, discard, move_new
from sparsify.errors import BackendError, CheckpointError
from sparsify.files.manifest import digest_of_manifest, write_json
from sparsify.files.ownership import Claim
from sparsify.files.reading import admit, read_json
from sparsify.files.staging import Staging, check_free
from sparsify.tensors import digest_of_span
from sparsify.tuning.recipe import Recipe
from sparsify.world.world import ALONE, World

_STATE, _TENSORS = "state.json", "state.safetensors"
# The loss of every step lies in it.
_MOST = 1 << 28
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class TuneState:
    """Where a run stands.

    Attributes:
        origins: what the run goes by beside its recipe, by name: digests of the model, of the sequences that are
            trained on and, where there is one, of the teacher.
        trained: the parameters that are trained, by name. step: optimizer steps done. losses: of each.
        leads: whether this is the process that keeps it.
    """

    folder: Path
    recipe: dict[str, Any]
    trained: dict[str, nn.Parameter]
    origins: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    leads: bool = True
    _moments: dict[str, Tensor] = field(default_factory=dict)
    _like: Path | None = None
    _claim: Claim | None = None

    @classmethod
    @contextmanager
    def of(
        cls,
        out: Path,
        recipe: Recipe,
        network: nn.Module,
        *,
        resume: bool,
        source: Path | None = None,
        origins: Mapping[str, str] | None = None,
        world: World = ALONE,
    ) -> Iterator[TuneState]:
        """A run that begins, or with ``resume`` goes on. Meanwhile no other run for the same ``out`` does.

        Args:
            source: the folder of the model, whose files' modes the state carries.
            origins: see the attribute. world: processes of which the first keeps the state, and tells the others.

        Raises:
            CheckpointError: nothing to go on from, a state of another recipe or other origins, or a damaged one.
            BackendError: another run for ``out`` is under way, or nothing can be written there.
        """
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not world.leads:
            state = cls(_folder(out), recipe.as_dict(), trained, origins or {}, leads=False)
            if resume:
                state._share(world)
            yield state
            return
        try:
            claim = Claim(_folder(out))
        except OSError as error:
            raise BackendError(
                f"output {out}", found=f"no state can be kept beside it ({error})", do="Choose another place with -o"
            ) from error
        with claim:
            check_free(_folder(out), overwrite=True)
            state = cls(_folder(out), recipe.as_dict(), trained, origins or {}, _like=source, _claim=claim)
            if resume:
                state._load()
                state._share(world)
            yield state

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """The whole state, put in place at once."""
        if not self.leads:
            return
        raw: Any = getattr(optimizer, "optimizer", optimizer)
        tensors = {f"parameter.{n}": p.detach().cpu().contiguous() for n, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for moment in _MOMENTS:
                value = raw.state[parameter][moment]
                tensors[f"{moment}.{name}"] = value.detach().cpu().contiguous().clone()
        content: dict[str, Any] = {"recipe": self.recipe, "step": self.step, "losses": self.losses}
        content["origins"] = dict(self.origins)
        with Staging(self.folder, overwrite=True, like=self._like, claim=self._claim) as staging:
            save_file(tensors, staging.folder / _TENSORS)
            content["digests"] = {"tensors": digest_of_span(staging.folder / _TENSORS)}
            content["digests"]["manifest"] = digest_of_manifest(content)
            write_json(staging.folder / _STATE, content)
            staging.commit()

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its moments back."""
        for name, parameter in self.trained.items():
            held = {m: self._moments[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS if self._moments}
            if held:
                # torch keeps the count of steps on the CPU.
                optimizer.state[parameter] = held | {"step": held["step"].cpu()}

    def forget(self) -> None:
        """The output is in its place: the state goes, at once."""
        if not self.leads:
            return
        gone = aside(self.folder, "partial")
        try:
            move_new(self.folder, gone)
        except FileNotFoundError:
            return
        discard(gone)

    def _share(self, world: World) -> None:
        """What the first process has loaded, in all of them."""
        if not world.divided:
            return
        self.step, self.losses = world.told([self.step, self.losses])[0]
        for name, parameter in self.trained.items():
            parameter.data.copy_(world.given(parameter.data, 0))
            for moment in _MOMENTS:
                shape = () if moment == "step" else parameter.shape
                empty = torch.empty(shape, dtype=torch.float32 if moment == "step" else parameter.dtype)
                key = f"{moment}.{name}"
                self._moments[key] = world.given(self._moments.get(key, empty), 0)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`save` wrote, both files held against their digests."""
        _check_there(self.folder)
        try:
            content = read_json(self.folder / _STATE, _MOST)
            written = content.get("digests")
            if not isinstance(written, dict) or written.get("manifest") != digest_of_manifest(content):
                raise _unread(self.folder, f"{_STATE} is not what was written")
            if written.get("tensors") != digest_of_span(admit(self.folder / _TENSORS)):
                raise _unread(self.folder, f"{_TENSORS} is not what was written")
            return content, load_file(self.folder / _TENSORS)
        except CheckpointError as error:
            raise _unread(self.folder, error.found) from error
        except (OSError, EOFError, SafetensorError) as error:
            raise _unread(self.folder, f"a state that cannot be read ({error})") from error

    def _load(self) -> None:
        content, tensors = self._read()
        before = content["recipe"]
        other = [k for k in {**self.recipe, **before} if before.get(k) != self.recipe.get(k) and k != "minutes"]
        origins = content.get("origins", {})
        other += [k for k in {**self.origins, **origins} if origins.get(k) != self.origins.get(k)]
        if other:
            raise CheckpointError(
                f"resuming from {self.folder}",
                found=f"a run with another {', '.join(other)}",
                do="Give the same options, or begin without --resume",
            )
        for name, parameter in self.trained.items():
            held = tensors.get(f"parameter.{name}")
            if held is None or held.shape != parameter.shape:
                raise CheckpointError(
                    f"resuming from {self.folder}", found=f"no {name} of that shape", do="Is it another model's state?"
                )
            parameter.data.copy_(held)
        self.step, self.losses, self._moments = content["step"], content["losses"], tensors


def _folder(out: Path) -> Path:
    return out.with_name(out.name + ".tuning")


def check_resumable(out: Path) -> None:
    """Raises:
    CheckpointError: nothing of an interrupted run to ``out`` is there.
    """
    _check_there(_folder(out))


def _check_there(folder: Path) -> None:
    if not (folder / _STATE).exists():
        raise _unread(folder, "no state to read there")


def _unread(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(f"resuming from {folder}", found=found, do="Begin without --resume")
