"""Speed and memory of the library against the plain formulation of the same computation.

Every benchmark is `python -m benchmarks.NAME [--json OUT]`. It runs all variants interleaved in one
process, prints the machine and a table, and writes one flat JSON object of numbers to OUT.
Figures are ratios from one run; absolute times belong to the machine that is printed with them.
"""
