"""What of a graph nothing reads any more once its weights were replaced."""

from __future__ import annotations

from torch import fx, nn

from sparsify.analysis.contraction import VIEWS
from sparsify.ir.operators import exact_name


def drop_unread(module: fx.GraphModule) -> None:
    """Take out the nodes that led to weights, and the tensors and modules that no node reads any more."""
    # Only what led to weights: torch's own sweep would take methods that write in place (``x.mul_(2)``) too.
    for node in reversed(list(module.graph.nodes)):
        if not node.users and (node.op == "get_attr" or exact_name(node) in VIEWS):
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    _drop_unread_tensors(module)


def _drop_unread_tensors(module: fx.GraphModule) -> None:
    """Parameters and buffers that no node reads: a packed weight's dense one must not stay in memory."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path, owner in list(module.named_modules()):
        if any(path == name or path.startswith(f"{name}.") for name in called):
            continue
        for table in (owner._parameters, owner._buffers):
            for leaf in list(table):
                if (f"{path}.{leaf}" if path else leaf) not in read:
                    del table[leaf]
    for path, owner in list(module.named_modules()):
        _drop_empty_children(owner, path, called)


def _drop_empty_children(owner: nn.Module, path: str, called: set[str]) -> None:
    for name, child in list(owner.named_children()):
        full = f"{path}.{name}" if path else name
        inside = any(c == full or c.startswith(f"{full}.") or full.startswith(f"{c}.") for c in called)
        if not inside and not any(True for _ in (*child.parameters(), *child.buffers())):
            del owner._modules[name]
