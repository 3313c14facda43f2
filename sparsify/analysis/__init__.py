"""Facts about a captured graph: linear sites and their groups, coupled dimensions, order and liveness."""
