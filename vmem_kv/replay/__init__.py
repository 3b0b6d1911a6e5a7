"""Real traffic through the real allocator, and through models of how others would hold it.

    schedule.py     continuous batching with a simulated clock: admit, grow, preempt, end
    memory.py       what the schedule asks of memory; the real allocator behind it
    rivals.py       the same questions answered by rules: maximum length, powers of two, PagedAttention
    sharing.py      the same once more, with prefixes shared: the index, and slots that alias each other's pages, over
                    stripes.py (which pages are shared), sharing_slots.py (who maps them), host_tier.py (a second tier)
    statistics.py   what is measured while it runs
    study.py        which schemes are held against each other, and how they are opened

Everything but the clock is real where the allocator is: each step calls `ensure` for all sequences, and each admission
and each end goes through `acquire` and `retire`. No torch is imported.
"""
