"""The serving loop: many requests, one model, one step at a time.

Read in the order in which a request passes through: request.py (what is asked and answered), scheduler.py (who
computes what in a step), slot_source.py and prefixes.py (the slot that it begins with, and what is in it already),
memory.py (all slots), packed.py or rows_route.py (the forward pass), sampler.py and
detokenizer.py (from logits to text), engine.py (the loop), then async_engine.py and llm.py (its two faces).
"""
