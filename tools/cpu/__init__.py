"""Parts of bench_cpu.py."""
