"""A captured model: its graph, the parameters behind it, and what is known of both."""
