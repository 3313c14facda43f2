"""Load a folder as its users do: with transformers, packed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsify  # noqa: F401 (registers packed folders with transformers)
from sparsify.errors import CheckpointError, SparsifyError, first_line
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.whole import check_folder
from sparsify.frontend.building.heads import name_class
from sparsify.frontend.text_config import text_config

if TYPE_CHECKING:
    import torch


def load_model(folder: str | Path, *, trust_remote_code: bool = False, check: bool = True) -> Any:
    """The model of a Hugging Face folder or hub id, packed or not, in eval mode, in the dtype that it is stored in.

    Args:
        check: hold every byte of a folder of ours against its ``sparsify.json``.

    Raises:
        CheckpointError: transformers does not load it, a parameter is missing, or it is not what was written.
    """
    import transformers

    checked: bool | str = check
    if Path(folder).is_dir():
        # Once is enough.
        checked = "held" if check_folder(Path(folder), check).complete else False
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            config.quantization_config["check"] = checked
        if Path(folder).is_dir():
            name_class(config, _stored(Path(folder)))
        names = list(getattr(config, "architectures", None) or [])
        kind: Any = getattr(transformers, names[0], None) if names else None
        if kind is None:
            causal = bool(names) and "CausalLM" in names[0]
            kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            own = {"trust_remote_code": trust_remote_code}
            return kind.from_pretrained(folder, config=config, dtype="auto", **own).eval()
        model, found = kind.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
        if lost := sorted(found["missing_keys"]):
            # transformers would go on with numbers drawn for it.
            raise CheckpointError(
                f"loading {folder}",
                found=f"its files hold no {lost[0]}" + (f", and {len(lost) - 1} more" if len(lost) > 1 else ""),
                do="Fetch or make the folder again",
            )
        return model.eval()
    except SparsifyError:
        raise
    except Exception as error:  # configs, models and libraries raise whatever they like
        raise CheckpointError(
            f"loading {folder}", found=f"transformers refuses it: {first_line(error)}", do="Check the folder"
        ) from error


def _stored(folder: Path) -> Iterator[str]:
    """The names of a folder's tensors; looked up only where they are asked for."""
    yield from Checkpoint(folder).names()


def load_on(
    folder: str | Path,
    device: torch.device,
    *,
    tune: bool = True,
    trust_remote_code: bool = False,
    check: bool = True,
) -> Any:
    """:func:`load_model`, on ``device``. A packed model takes the layouts of a GPU by what its folder says.

    Args:
        tune: False: take built-in defaults, whatever the folder says.

    Raises:
        CheckpointError: it does not load. BackendError: kernels do not compile.
    """
    from sparsify.backends.packed.loaded.linear import PackedLinear
    from sparsify.backends.packed.loaded.on_gpu import prepare, widen
    from sparsify.backends.packed.loaded.product import GPU_TYPE
    from sparsify.runtime.cuda.gpu import GPU

    model = load_model(folder, trust_remote_code=trust_remote_code, check=check)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.product.tune = module.product.tune and tune
    gpu = getattr(getattr(model.config, "quantization_config", None), "gpu", {})
    if device.type == GPU_TYPE:
        widen(model, gpu.get("policy", "decode"), GPU.of(device), everywhere=True)
    model = model.to(device)
    prepare(model, **(gpu | {"tune": gpu.get("tune", True) and tune}))
    return model


def first_inputs(model: Any, length: int = 1) -> dict[str, torch.Tensor]:
    """Seeded inputs for one forward: ``length`` tokens, or an image."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config = text_config(model.config)
    if getattr(config, "vocab_size", None) is None:
        size = model.config.image_size
        side = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(1, channels, *side, generator=generator).to(model.dtype)}
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
