"""Facts about a captured graph: linear sites and their groups, coupled dimensions, regions and liveness."""

from sparsify.analysis.dimension import Dimensions, Group, Member, coupled_dimensions
from sparsify.analysis.linear import InputGroup, LinearSite, Opaque, block_starts, find_sites, group_by_input
from sparsify.analysis.region import Flow

__all__ = [
    "Dimensions", "Flow", "Group", "InputGroup", "LinearSite", "Member", "Opaque", "block_starts", "coupled_dimensions",
    "find_sites", "group_by_input",
]  # fmt: skip
