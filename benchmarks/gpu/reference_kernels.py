"""Every attention kernel of vmem_kv on the CPU: its own adapter over a reference operator."""

from __future__ import annotations

from collections.abc import Sequence

from vmem_kv.attention.base import Kernel
from vmem_kv.attention.fa3 import Fa3
from vmem_kv.attention.flash_attn import FlashAttn, FlashAttnOperators
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.attention.torch_flash import TorchFlash
from vmem_kv.testing import attention_ops


def kernels_on_the_cpu() -> Sequence[Kernel]:
    """Return them in the order of `all_kernels`."""
    flash_attn = FlashAttnOperators(attention_ops.flash_attn_varlen_forward, attention_ops.flash_attn_with_kvcache)
    return (
        Fa3(attention_ops.fa3_with_kvcache),
        FlashAttn(flash_attn),
        TorchFlash(attention_ops.flash_attention_forward),
        Sdpa(),
    )
