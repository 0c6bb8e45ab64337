"""Launches counted on tensors without data are those of a real run: the interpreter's, op by op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.permute import permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows, quantize_rows_and_columns, requantize_columns
from tests.fake_cuda.trace import Trace


def kernels_a_call(trace: Trace) -> dict[str, float]:
    """Kernels, PyTorch's own left out, that a call of each of the project's ops launches in the trace."""
    calls = Counter(call.op for call in trace.calls)
    launched = Counter(one.op for one in trace.launches if not one.kernel.startswith("aten::"))
    return {op: launched[op] / number for op, number in calls.items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_interpreter_launches_as_many(
    triton_device: str, traces: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launches: list[Any] = []
    execute = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn)
        execute(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    x, ids = torch.randn(16, 128).bfloat16(), torch.arange(32).view(16, 2) % 3
    row_map, rows, packed = plan_rows(ids, 3, align=16, room=96), quantize_rows(x), pack_e5m6(x)
    runs: dict[str, Callable[[], Any]] = {
        "plan_rows": lambda: plan_rows(ids, 3, align=16, room=96),
        "permute": lambda: permute(rows, row_map),
        "permute_quantize": lambda: permute_quantize(x, row_map),
        "unpermute": lambda: unpermute(permute(x, row_map), row_map),
        "quantize_rows": lambda: quantize_rows(x),
        "quantize_rows_and_columns": lambda: quantize_rows_and_columns(x),
        "requantize_columns": lambda: requantize_columns(rows),
        "pack_e5m6": lambda: pack_e5m6(x),
        "unpack_e5m6": lambda: unpack_e5m6(packed),
        "e5m6_to_columns": lambda: e5m6_to_columns(packed),
    }
    expected, found = kernels_a_call(traces("fp8", 4096)), {}
    for op, run in runs.items():
        launches.clear()
        run()
        found[op] = len(launches) - (op == "unpermute")  # which permuted first
    assert found == {op: expected[op] for op in runs}
