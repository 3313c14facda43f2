"""The parts of a GPU run. Each module's ``steps(machine, results)`` lists what it does, by name; imports no torch."""

# Seconds of each at most, in the order of what matters most; the last has what is left. They are limits and not
# shares: a part that is done early leaves its time to the others.
PARTS = {"first": 110, "checks": 120, "shapes": 180, "decode": 180, "pruning": 180, "counters": 300}
# Of all of them; a command on a lent machine may take 600.
BUDGET = 570
# Steps of `first` without which nothing else can be measured of the kernels, and what is still worth its time then.
NEEDED = {"first": ("compile BFloat16", "decode")}
WITHOUT = ("pruning",)
