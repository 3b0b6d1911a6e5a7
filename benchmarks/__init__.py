"""Programs that measure; run them from the repository's root:

    python -m benchmarks.generate --json generate.json --plot generate.png
    python -m benchmarks.allocator --json allocator.json

Each prints tables and its targets, met or missed, and writes everything it measured as JSON. They compare systems in
one process, in turn, over several rounds, and state ratios within a round: on a machine that others use too, ratios
survive where absolute times do not. Nothing here is a test, and no test reads a time.
"""
