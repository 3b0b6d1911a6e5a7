"""Variable-length attention over slots: one contract, one file per kernel.

Read base.py (the contract) and batch.py (one step's sequences) first, then the kernels: sdpa, native, torch_flash,
flash_attn, fa3. choose.py picks one and says why. Packages other than torch are imported when a kernel that needs them
is asked about on a CUDA device, not before.
"""
