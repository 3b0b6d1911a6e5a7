"""Tests of the allocator core: no torch, no GPU, no model."""
