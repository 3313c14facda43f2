"""Facts about a captured graph: linear sites and their groups, regions and liveness."""

from sparsify.analysis.linear import InputGroup, LinearSite, Opaque, block_starts, find_sites, group_by_input
from sparsify.analysis.region import Flow

__all__ = ["Flow", "InputGroup", "LinearSite", "Opaque", "block_starts", "find_sites", "group_by_input"]
