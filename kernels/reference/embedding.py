"""The embedding's weight gradient: on a CPU `index_add_` goes token by token, on a GPU only in deterministic mode."""

from torch import Tensor


def embedding_wgrad(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    main_grad.index_add_(0, ids, dy.float())
