"""Products with packed weights: layouts, operators, and the kernels behind them. Knows no compiler."""
