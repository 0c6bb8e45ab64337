"""What PyTorch is told of each op: its arguments, what it changes, its results and how to allocate them.

`library` registers every op by its row of DECLARATIONS. `fake_results` allocates the results of one call and computes
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fp8moe.kernels import device_layout
from fp8moe.kernels import fake_results as fake

PARTS = {
    "Tensor": ("Tensor {}",),
    "Maybe": ("Tensor? {}",),
    "Total": ("Tensor({0}!) {0}",),  # mutated in place
    "MaybeTotal": ("Tensor({0}!)? {0}",),  # likewise, where it is not None
    "Fp8": ("Tensor {}_data", "Tensor {}_scale", "int[] {}_tile"),
    "Fp8Total": ("Tensor({0}_data!) {0}_data", "Tensor({0}_scale!) {0}_scale", "int[] {0}_tile"),
    "E5m6": ("Tensor {}_data", "Tensor {}_scale"),
    "Map": (
        *("Tensor {}_source", "Tensor {}_slot", "Tensor {}_offsets", "Tensor {}_tokens", "Tensor {}_rows"),
        *("SymInt {}_num_rows", "SymInt {}_topk"),
    ),
    "Layout": ("ScalarType {}_dtype", "int {}_width", "int {}_topk"),
    "Segments": ("int[] {}_spans", "Tensor {}_parts"),
    "int": ("int {}",),
}
_ADAMW = "float lr, float beta1, float beta2, float eps, float weight_decay, int step, Tensor? grad_scale"
_STATE = ("Total master", "Tensor grad", "Total exp_avg", "Total exp_avg_sq")
_CAST = "float amax_floor, bool power_of_two"
_LIMIT = "float? limit"
_ROUTING = "str score, bool normalize, float route_scale"
_ANGLES = ("Tensor cos", "Tensor sin")

Fake = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Declaration:
    """An op: its arguments as "Kind name", its keyword arguments as a schema, its results, and how to allocate them.

    results: "rows", "blocks", "e5m6" or "tensor" each; "maybe" stands last, a tensor that only some arguments give.
    """

    arguments: tuple[str, ...]
    keywords: str
    results: tuple[str, ...]
    fake: Fake

    @property
    def kinds(self) -> list[str]:
        """The kind of each positional argument."""
        return [argument.split()[0] for argument in self.arguments]

    @property
    def schema(self) -> str:
        """Arguments and result in PyTorch's schema language."""
        parts = [part.format(name) for kind, name in map(str.split, self.arguments) for part in PARTS[kind]]
        parts += ["*", self.keywords] if self.keywords else []
        results = f"({', '.join(['Tensor'] * len(self.results))})" if self.mutates else "Tensor[]"
        return f"({', '.join(parts)}) -> {results if self.results else '()'}"

    @property
    def mutates(self) -> bool:
        """Whether it changes an argument: torch.compile then takes single tensors for results, and no list of them."""
        return any(kind in ("Total", "MaybeTotal", "Fp8Total") for kind in self.kinds)

    def returned(self, tensors: list[Tensor]) -> Any:
        """The results as the operator must return them."""
        if not self.results:
            return None
        if not self.mutates:
            return tensors
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


DECLARATIONS = {
    "quantize_rows": Declaration(("Tensor x",), _CAST, ("rows",), fake.cast_rows),
    "quantize_columns": Declaration(("Tensor x",), _CAST, ("rows",), fake.cast_columns),
    "quantize_rows_and_columns": Declaration(
        ("Tensor x",), _CAST, ("rows", "rows"), lambda x, **kwargs: fake.cast_rows(x) + fake.cast_columns(x)
    ),
    "quantize_blocks": Declaration(("Tensor w",), _CAST, ("blocks", "blocks"), fake.cast_blocks),
    "requantize_columns": Declaration(("Fp8 rows",), "float amax_floor", ("rows",), fake.cast_columns),
    "pack_e5m6": Declaration(("Tensor x",), "float amax_floor", ("e5m6",), fake.packed),
    "unpack_e5m6": Declaration(("E5m6 packed",), "ScalarType dtype", ("tensor",), fake.unpacked),
    "e5m6_to_columns": Declaration(("E5m6 packed",), "float amax_floor", ("rows",), fake.cast_columns),
    "rms_norm": Declaration(
        ("Tensor x", "Tensor weight", "Maybe delta"),
        "float eps, bool tensor, bool rows, bool power_of_two",
        ("tensor", "tensor", "rows", "tensor"),
        fake.normed,
    ),
    "rms_norm_columns": Declaration(
        ("Tensor x", "Tensor weight", "Tensor inverse_rms"),
        "bool power_of_two",
        ("rows",),
        lambda x, *_, **__: fake.cast_columns(x),
    ),
    "rms_norm_backward": Declaration(
        ("Tensor dy", "Tensor x", "Tensor weight", "Tensor inverse_rms", "Total main_grad", "Maybe residual"),
        "",
        ("tensor",),
        fake.contiguous,
    ),
    "rope_queries": Declaration(("Tensor q", *_ANGLES), "", ("tensor",), fake.contiguous),
    "rope_queries_backward": Declaration(("Tensor dq", *_ANGLES), "", ("tensor",), fake.contiguous),
    "rope_keys": Declaration(
        ("Tensor kv", "Tensor k_rope", *_ANGLES), "int nope_dim", ("tensor",), device_layout.empty_keys
    ),
    "rope_keys_backward": Declaration(
        ("Tensor dk", "Tensor dv", *_ANGLES), "", ("tensor", "tensor"), device_layout.empty_keys_gradient
    ),
    "plan_rows": Declaration(
        ("Tensor topk_ids", "int num_experts", "Maybe order"),
        "int align, SymInt room, int first",
        ("tensor",) * 5,
        fake.planned,
    ),
    "plan_message": Declaration(
        ("Tensor topk_ids", "int num_peers", "int experts_per_peer"),
        "SymInt room, int first, bool fixed",
        ("tensor",) * 5,
        fake.planned_message,
    ),
    **{
        f"pack_message{suffix}": Declaration(
            (f"{kind} rows", "Map row_map", "Maybe topk_ids", "Maybe weights"), "int sender", ("tensor",), fake.message
        )
        for kind, suffix in (("Tensor", ""), ("Fp8", "_fp8"))
    },
    **{
        f"unpack_message{suffix}": Declaration(
            ("Tensor message", "Map row_map", "Layout layout"),
            "",
            (kind, "maybe"),
            fake.unpacked_message,
        )
        for kind, suffix in (("tensor", ""), ("rows", "_fp8"))
    },
    "permute": Declaration(("Tensor x", "Map row_map"), "", ("tensor",), fake.moved),
    "permute_fp8": Declaration(("Fp8 x", "Map row_map"), "", ("rows",), fake.cast_copies),
    "permute_quantize": Declaration(("Tensor x", "Map row_map"), _CAST, ("rows",), fake.cast_copies),
    "unpermute": Declaration(("Tensor y_R", "Map row_map"), "", ("tensor",), fake.summed),
    "unpermute_into": Declaration(("Tensor y_R", "Map row_map", "Total out"), "", (), fake.nothing),
    "swiglu": Declaration(
        ("Tensor gate_up", "Maybe weights", "Maybe bias", "Maybe group_offsets"),
        f"{_LIMIT}, bool power_of_two",
        ("rows", "rows"),
        fake.activated,
    ),
    "swiglu_columns": Declaration(("Fp8 cached", "Maybe weights"), _LIMIT, ("rows",), fake.activated_columns),
    "swiglu_backward": Declaration(
        ("Tensor dy", "Fp8 cached", "Maybe weights"),
        f"{_LIMIT}, bool power_of_two",
        ("rows", "rows", "maybe"),
        fake.activation_gradients,
    ),
    "silu_mul": Declaration(("Tensor gate_up", "Maybe weights"), _LIMIT, ("tensor",), fake.silu_mul),
    "silu_mul_backward": Declaration(
        ("Tensor dy", "Tensor gate_up", "Maybe weights"), _LIMIT, ("tensor", "maybe"), fake.silu_mul_gradients
    ),
    "add_expert_bias": Declaration(
        ("Total y", "Tensor bias", "Tensor group_offsets", "Maybe weights"), "", (), fake.nothing
    ),
    **{
        f"expert_bias_dgrad{suffix}": Declaration(
            (f"{kind} dy", "Tensor bias", "Tensor group_offsets", "Total d_weights"), "", (), fake.nothing
        )
        for kind, suffix in (("Tensor", ""), ("Fp8", "_fp8"))
    },
    **{
        f"expert_bias_wgrad{suffix}": Declaration(
            (f"{kind} dy", "Tensor group_offsets", "Total main_grad", "Maybe weights"), "", (), fake.nothing
        )
        for kind, suffix in (("Tensor", ""), ("Fp8", "_fp8"))
    },
    "route": Declaration(
        ("Tensor logits", "Tensor bias", "MaybeTotal counts"),
        f"int topk, int num_groups, int top_groups, str group_score, {_ROUTING}, int num_sequences, bool force_balance",
        ("tensor",) * 4,
        fake.routed,
    ),
    "route_backward": Declaration(
        ("Tensor logits", "Tensor topk_ids", "Tensor f", "Tensor d_weights", "Tensor d_loss"),
        _ROUTING,
        ("tensor",),
        fake.d_logits,
    ),
    "gemm": Declaration(("Fp8 a", "Fp8 b"), "ScalarType out_dtype", ("tensor",), fake.product),
    "gemm_add": Declaration(("Fp8 a", "Fp8 b", "Total total"), "", (), fake.nothing),
    "wgrad": Declaration(("Tensor dy", "Tensor x", "Total main_grad"), "", (), fake.nothing),
    "grouped_gemm": Declaration(
        ("Fp8 a", "Fp8 b", "Tensor group_offsets"), "ScalarType out_dtype", ("tensor",), fake.product
    ),
    "grouped_wgrad": Declaration(
        ("Fp8 dy_columns", "Fp8 x_columns", "Tensor group_offsets", "Total main_grad"), "", (), fake.nothing
    ),
    "grouped_mm": Declaration(("Tensor x", "Tensor w", "Tensor group_offsets"), "", ("tensor",), fake.product),
    "grouped_mm_wgrad": Declaration(
        ("Tensor dy", "Tensor x", "Tensor group_offsets", "Total main_grad"), "", (), fake.nothing
    ),
    "decode_attention": Declaration(
        ("Tensor q", "Tensor keys", "Tensor values", "Tensor positions", "Maybe rows", "Maybe sinks"),
        "SymInt length, float scale, SymInt? window",
        ("tensor",),
        fake.attended,
    ),
    "adamw_step": Declaration((*_STATE, "Segments segments", "MaybeTotal weight"), _ADAMW, (), fake.nothing),
    "adamw_step_quantize": Declaration(
        (*_STATE, "Total weight", "Fp8Total blocks", "Fp8Total transposed"),
        f"{_ADAMW}, bool power_of_two",
        (),
        fake.nothing,
    ),
    "squared_norm": Declaration(("Tensor flat",), "", ("tensor",), fake.sum),
    "cross_entropy": Declaration(("Tensor logits", "Tensor labels", "Total losses"), "", (), fake.nothing),
    "cross_entropy_with_gradient": Declaration(
        ("Total logits", "Tensor labels", "Tensor weight", "Total losses"), "", (), fake.nothing
    ),
    "embedding_wgrad": Declaration(("Tensor dy", "Tensor ids", "Total main_grad"), "", (), fake.nothing),
}
