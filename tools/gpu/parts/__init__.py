"""The parts of a GPU run. Each module's ``steps(machine, results)`` lists what it does, by name; imports no torch."""

# Seconds of each, in the order of what matters most. The last has what is left.
PARTS = {"first": 75, "checks": 120, "shapes": 150, "decode": 130, "pruning": 90, "counters": 300}
# Of all of them; a command on a lent machine may take 600.
BUDGET = 570
