"""The BF16 weight gradient of experts on Hopper: `tokens_kernel`, with offsets."""

from torch import Tensor

from fp8moe.kernels.gluon.launch import choose_tile, num_sms, typical_rows
from fp8moe.kernels.gluon.launch_tokens import by_triton, launch_tokens
from fp8moe.kernels.gluon.ready import ready_tokens
from fp8moe.kernels.triton import grouped_mm


def grouped_mm_wgrad(dy: Tensor, x: Tensor, group_offsets: Tensor, main_grad: Tensor) -> None:
    launch_on = ready_tokens("grouped_mm_wgrad", dy, x, main_grad)
    if launch_on is not None:
        launch_on(dy, x, main_grad, group_offsets.contiguous())
        return
    num_groups, n, k = main_grad.shape
    if main_grad.numel() == 0 or len(dy) == 0:
        return
    if by_triton(dy, x, main_grad):
        grouped_mm.grouped_mm_wgrad(dy, x, group_offsets, main_grad)
        return
    tile = choose_tile("grouped_mm_wgrad", n, k, typical_rows(len(dy), num_groups), main_grad.device, num_groups)
    launch_tokens(dy, x, main_grad, group_offsets.contiguous(), tile=tile, sms=num_sms(main_grad.device))
