"""One rank's dispatcher on the device back end: what experts receive and what returns is the specification's."""

import torch

from fp8moe.kernels import backend
from fp8moe.kernels.permute import permute
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.layers.dispatch import LocalDispatcher, gradient_rows


def four_verbs(x_TD, ids_TK, weights_TK):
    """Bytes of everything that the four verbs deliver, by name."""
    dispatcher = LocalDispatcher(5)
    arrived = dispatcher.dispatch(
        quantize_rows(x_TD, power_of_two=True), dispatcher.announce(ids_TK), weights_TK
    ).wait()
    rows, state = arrived.rows_RD, arrived.state
    y_RD = rows.dequantize(torch.bfloat16) * arrived.weights_R[:, None].bfloat16()
    gradient = dispatcher.combine_backward(x_TD * 2.0**-20, state, fp8=True).wait()
    sent = permute(gradient_rows(x_TD * 2.0**-20, fp8=True), state)
    assert torch.equal(gradient.data.view(torch.uint8), sent.data.view(torch.uint8))
    assert torch.equal(gradient.scale, sent.scale)
    dx_TD, dweights_TK = dispatcher.dispatch_backward(y_RD, arrived.weights_R, state).wait()
    delivered = {
        **{"codes": rows.data, "scales": rows.scale, "weights": arrived.weights_R, "offsets": arrived.group_offsets},
        **{"y": dispatcher.combine(y_RD, state).wait(), "gradient": gradient.data, "its scales": gradient.scale},
        **{"dx": dx_TD, "dweights": dweights_TK},
    }
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in delivered.items()}


def test_the_device_back_end_delivers_what_the_specification_does(triton_device):
    x_TD = torch.randn(30, 144, device=triton_device).bfloat16()
    ids_TK = torch.rand(30, 5, device=triton_device).topk(2, dim=1).indices
    weights_TK = torch.rand(30, 2, device=triton_device)
    ours = four_verbs(x_TD, ids_TK, weights_TK)
    backend.set_backend("reference")
    theirs = four_verbs(x_TD, ids_TK, weights_TK)
    for name, delivered in theirs.items():
        assert torch.equal(ours[name], delivered), name
