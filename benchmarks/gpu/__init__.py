"""The GPU suite: one command that finds out, on a machine that nobody has seen, what the CUDA path does and costs.

    python benchmarks/gpu/run.py                 on a machine with a CUDA device
    python benchmarks/gpu/run.py --emulate       the same code on the emulated driver, without a device

Read it in this order: `run` → `suite` (the command) → `preflight` (whether the device works) → `plan` (what is
measured, as data) → `runner` and `worker` (one process per part, one more for every case that may end it) → `cases`
(what a part is made of) → `bench` (the device) → the parts: `facts`, `correctness`, `speed`, `interference`,
`generation` → `results` (JSON and Markdown) → `summary` (the last lines of the output).

A part is a list of cases in the order of their worth. What ends the process that runs a case becomes a row of the
results, and the next case runs in a fresh process; what does not fit the time budget is listed as skipped.
"""
