"""Questions to the autograd graph that is already there; nothing is computed and nothing is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def reaches(root: Tensor, leaves: Collection[Tensor], *, around: Iterable[Tensor] = ()) -> bool:
    """Whether the graph of ``root`` leads to one of ``leaves`` on a path that avoids the tensors ``around``.

    The search ends at the first leaf. It costs host time in the size of the graph that it sees: a few nodes
    where ``around`` closes off the model.

    Args:
        root: tensor with a graph, or a leaf.
        leaves: leaf tensors that require gradients.
        around: tensors of the same graph behind which the search does not look.

    Returns:
        Whether there is such a path.
    """
    wanted = {id(leaf) for leaf in leaves}
    seen: set[Any] = {_edge(tensor) for tensor in around}  # the nodes in it stay alive, hence distinct
    todo = [_edge(root)]
    while todo:
        edge = todo.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        if id(getattr(node, "variable", None)) in wanted:  # AccumulateGrad of a leaf
            return True
        todo.extend(node.next_functions)
    return False


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Node and output number where the gradient of ``tensor`` arrives; none where no gradient is wanted."""
    if not tensor.requires_grad:
        return None, 0
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr
