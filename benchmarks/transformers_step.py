"""`transformers`' DeepSeek-V3 of the same weights, sizes and batch as a run of ours: what a step is measured beside.

The model is the tests' oracle (`tests/model/hf_oracle.py`). It has no MTP module and no balance loss, its gradients
are tensors of the weights' dtype where ours are added into FP32; what it is compared with has `model.mtp_depth=0`.
Attention is "eager" or "sdpa": which one is faster depends on the machine, so both are measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fp8moe.data.packing import Batch
    from fp8moe.train.run import Run

ATTENTION = ("eager", "sdpa")


def transformers_step(run: Run, batch: Batch, dtype: torch.dtype, attention: str) -> Callable[[], float]:
    """A call that zeroes gradients, goes forward and backward, and gives the loss, nats a predicted token.

    The weights are copies of those of `run`, which has no MTP module. ModuleNotFoundError without `transformers`.
    """
    oracle: Any = importlib.import_module("tests.model.hf_oracle")  # whose types nobody checks
    assert run.config.model.mtp_depth == 0, "transformers' class has no MTP module"
    weights = {name: tensor.float().cpu() for name, tensor in run.model.state_dict().items()}
    model = oracle.transformers_model(run.config.model, weights)
    model.to(run.device, dtype).train()
    model.set_attn_implementation(attention)
    ids, labels = batch.inputs_BS.to(run.device), batch.labels_BS.to(run.device)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return step
