"""Request traces and model shapes, as plain data.

    scan_trace    checks a whole file and says what is in it
    read_trace    its requests, one after another
    Request       arrival, prompt tokens, output tokens, blocks that prompts share
    find_shape    a model's K and V shapes, by name or by numbers

Pure Python: neither the allocator nor torch is imported.
"""

from vmem_kv.traces.formats import Request, TraceSummary, read_trace, scan_trace
from vmem_kv.traces.shapes import SHAPES, ModelShape, find_shape

__all__ = ["SHAPES", "ModelShape", "Request", "TraceSummary", "find_shape", "read_trace", "scan_trace"]
