"""What who starts vLLM asks of us: ``--additional-config '{"sparsify": {"policy": "both"}}'``.

A free dictionary of vLLM's own, which every process of an engine gets, and which is part of the key that compiled
graphs are kept under. ``--hf-overrides`` would replace quantization_config as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.errors import SpecError, near
from sparsify.runtime.words import COPY_POLICIES, POLICIES

_KEY, _POLICY = "sparsify", "policy"
_EXAMPLE = """--additional-config '{"sparsify": {"policy": "both"}}'"""


def asked_policy(additional: Any, *, on_cpu: bool) -> str | None:
    """The policy that was asked for, which goes before the folder's; None: none was.

    Args:
        additional: vLLM's ``additional_config``.

    Raises:
        SpecError: another thing was asked for, or no policy of that device.
    """
    own = additional.get(_KEY) if isinstance(additional, Mapping) else None
    if own is None:
        return None
    if not isinstance(own, Mapping):
        raise SpecError(f"--additional-config of {_KEY}: {own!r}", found="no object", do=f"As in {_EXAMPLE}")
    for key in own:
        if key != _POLICY:
            raise SpecError(
                f"--additional-config of {_KEY}: {key!r}", found="no such key", do=near(str(key), [_POLICY])
            )
    policy, known = own.get(_POLICY, "decode"), COPY_POLICIES if on_cpu else POLICIES
    if policy in known:
        return str(policy)
    asked = f"--additional-config of {_KEY}: the policy {policy!r}"
    if policy in POLICIES:
        raise SpecError(
            asked,
            found="a policy of GPUs: on CPUs a weight for many tokens alone is the dense one",
            do=f"Take {' or '.join(COPY_POLICIES)}, or serve what `sparsify unpack` writes",
        )
    raise SpecError(asked, found="no such policy", do=near(str(policy), known))
