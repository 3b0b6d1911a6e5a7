"""A radix tree over token ids with compressed edges: the walk, the split and the merge.

Guarantees: edges are found by their first token and then compared in full, in C; no hash is trusted. Tokens are kept
once, however many sequences run over them. A node other than the root has an end, or at least two children.
Assumptions: one thread at a time; tokens come from `encode`.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from vmem_kv.errors import InvariantError, UsageError

TOKEN_BYTES = 4

E = TypeVar("E")
"""What ends at a node."""


def encode(token_ids: Sequence[int] | array[int]) -> bytes:
    """Return token ids as bytes, `TOKEN_BYTES` each, in the machine's order.

    Raises:
        UsageError: One of them is not an integer from 0 to 2**32 - 1.
    """
    if isinstance(token_ids, str | bytes | bytearray):
        raise UsageError(f"token ids came as {type(token_ids).__name__}; give a sequence of integers")
    try:
        with memoryview(token_ids) as view:  # type: ignore[arg-type]
            if view.format == "I" and view.itemsize == TOKEN_BYTES and view.ndim == 1:
                return view.tobytes()
    except TypeError:
        pass  # it has no buffer: a list or a tuple
    try:
        return array("I", token_ids).tobytes()
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"token ids must be integers from 0 to 2**32 - 1: {error}") from error


def n_common_tokens(left: bytes, right: bytes, offset: int) -> int:
    """Return how many tokens `left` shares with `right` from the byte `offset` on."""
    n_bytes = min(len(left), len(right) - offset)
    view = memoryview(left)
    if right.startswith(view[:n_bytes], offset):
        return n_bytes // TOKEN_BYTES
    same, different = 0, n_bytes // TOKEN_BYTES  # so many tokens are equal; so many are not
    while different - same > 1:
        middle = (same + different) // 2
        if right.startswith(view[same * TOKEN_BYTES : middle * TOKEN_BYTES], offset + same * TOKEN_BYTES):
            same = middle
        else:
            different = middle
    return same


class Node(Generic[E]):
    """A point in the tree, and the edge that leads to it.

    `children` and `ends` are ordered by use: what was used last comes last.
    """

    __slots__ = ("children", "depth", "ends", "label", "parent")

    def __init__(self, label: bytes = b"", parent: Node[E] | None = None) -> None:
        self.label = label  # tokens from the parent to here, encoded
        self.parent = parent
        self.depth: int = len(label) // TOKEN_BYTES + (
            parent.depth if parent is not None else 0
        )  # tokens from the root
        self.children: dict[bytes, Node[E]] = {}  # by the first token of their labels
        self.ends: dict[Hashable, E] = {}  # by their keys

    @property
    def n_label_tokens(self) -> int:
        """Tokens between the parent and here."""
        return len(self.label) // TOKEN_BYTES

    def path(self) -> Iterator[Node[E]]:
        """This node and all above it, the root last."""
        node: Node[E] | None = self
        while node is not None:
            yield node
            node = node.parent

    def used(self, key: Hashable) -> None:
        """Note that an end of this node was used: it and all edges to it become the last ones of their nodes."""
        self.ends[key] = self.ends.pop(key)
        for node in self.path():
            if node.parent is not None:
                first = node.label[:TOKEN_BYTES]
                node.parent.children[first] = node.parent.children.pop(first)

    def last_used(self) -> E:
        """An end at or below this node: the last used at the highest node, on the way along the last used edges."""
        node = self
        while not node.ends:
            node = next(reversed(node.children.values()))
        return next(reversed(node.ends.values()))


def walk(root: Node[E], query: bytes, start: int = 0) -> tuple[Node[E], Node[E] | None, int]:
    """Follow `query` from its byte `start` as far as the tree goes.

    Returns:
        The last node that was reached; the child whose edge was entered and not finished, if there is one; and how many
        tokens of that edge match.
    """
    node = root
    while start < len(query):
        child = node.children.get(query[start : start + TOKEN_BYTES])
        if child is None:
            break
        n_common = n_common_tokens(child.label, query, start)
        if n_common < child.n_label_tokens:
            return node, child, n_common
        node = child
        start += len(child.label)
    return node, None, 0


def place(root: Node[E], tokens: bytes) -> tuple[Node[E], int]:
    """Find the node at the end of `tokens` below `root`, and make it where it does not exist.

    Returns:
        The node, and how many tokens the tree holds more. What is made has no end yet: the caller gives it one.
    """
    node, child, n_common = walk(root, tokens)
    if child is not None:
        node = split(child, n_common)
    rest = tokens[(node.depth - root.depth) * TOKEN_BYTES :]
    if rest:
        leaf = Node(rest, node)
        node.children[rest[:TOKEN_BYTES]] = leaf
        node = leaf
    return node, len(rest) // TOKEN_BYTES


def split(node: Node[E], n_tokens: int) -> Node[E]:
    """Put a new node on the edge to `node`, `n_tokens` below its parent, and return it. Orders of use stay."""
    if node.parent is None or not 0 < n_tokens < node.n_label_tokens:
        raise InvariantError(f"an edge of {node.n_label_tokens} tokens cannot be split after {n_tokens}")
    cut = n_tokens * TOKEN_BYTES
    upper = Node(node.label[:cut], node.parent)
    node.parent.children[node.label[:TOKEN_BYTES]] = upper
    node.label = node.label[cut:]
    node.parent = upper
    upper.children[node.label[:TOKEN_BYTES]] = node
    return upper


def vacate(node: Node[E]) -> int:
    """Remove a node that nothing ends at, as far as nothing needs it: a leaf goes, a lone child's edge grows.

    Returns:
        How many tokens the tree holds less.
    """
    n_gone = 0
    while node.parent is not None and not node.ends:
        parent, first = node.parent, node.label[:TOKEN_BYTES]
        if not node.children:
            del parent.children[first]
            n_gone += node.n_label_tokens
            node = parent
            continue
        if len(node.children) == 1:
            (child,) = node.children.values()
            child.label = node.label + child.label
            child.parent = parent
            parent.children[first] = child
        break
    return n_gone


def check(root: Node[E]) -> int:
    """Walk the whole tree and return how many tokens its edges hold.

    Raises:
        InvariantError: A node has neither an end nor two children, or its edge, depth or parent is wrong.
    """
    n_tokens = 0
    nodes = [root]
    while nodes:
        node = nodes.pop()
        for first, child in node.children.items():
            is_sound = (
                child.parent is node
                and len(child.label) >= TOKEN_BYTES
                and len(child.label) % TOKEN_BYTES == 0
                and child.label[:TOKEN_BYTES] == first
                and child.depth == node.depth + child.n_label_tokens
                and (child.ends or len(child.children) > 1)
            )
            if not is_sound:
                raise InvariantError(
                    f"the node at token {child.depth} below one at {node.depth} is not sound: label of "
                    f"{child.n_label_tokens} tokens, {len(child.ends)} ends, {len(child.children)} children"
                )
            n_tokens += child.n_label_tokens
            nodes.append(child)
    return n_tokens
