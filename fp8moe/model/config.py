"""The shape of a model, checked when it is made.

Names follow the DeepSeek-V3 report (arXiv 2412.19437, sections 2.1 and 4.2). Attention, router and experts have their
own configurations, beside the layers that read them; what concerns two of them is checked here, so that a model that
was configured can be built. FP8 takes sizes that are multiples of 16 (a short last tile of 128 is fine), and a
configuration obeys that in every precision, so that `precision=` can be switched freely.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8moe.layers.attention import AttentionConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.router import RouterConfig
from fp8moe.limits import SIZE, Range, check_fields, shown

FP8_MULTIPLE = 16
MAX_VOCAB = 2**24


@dataclass(frozen=True)
class ModelConfig:
    """A transformer of dense layers and mixtures of experts, an MTP module; attention by its own configuration.

    Sizes count features unless said otherwise. Raises ValueError with the rule, both numbers and the nearest legal
    choice when sizes don't fit.
    """

    vocab_size: int  # tokens of the embedding and the head
    dim: int  # features of the residual stream
    num_layers: int  # transformer layers, without the MTP module
    num_dense_layers: int  # dense layers at the start; the others are mixtures of experts
    dense_hidden: int  # features inside a dense layer's MLP
    attention: AttentionConfig  # multi-head latent attention (mla) or grouped queries (gqa)
    router: RouterConfig  # how experts are chosen for a token
    experts: ExpertsConfig  # routed and shared experts
    mtp_depth: int = 0  # further tokens that the MTP module predicts
    mtp_weight: float = 0.3  # of the MTP module's loss
    norm_eps: float = 1e-6  # of every RMSNorm
    init_std: float = 0.006  # standard deviation of the initial weights
    max_seq_len: int = 4096  # longest sequence
    dense_layers: tuple[int, ...] = ()  # numbers of further dense layers, ascending

    def __post_init__(self) -> None:
        check_fields(
            self,
            "model",
            vocab_size=Range(least=1, most=MAX_VOCAB),
            dim=SIZE,
            num_layers=Range(least=1, most=4096),
            num_dense_layers=Range(least=0, most=4096, use="use 0 for none"),
            dense_hidden=SIZE,
            dense_layers=Range(least=0, most=4095),
            mtp_depth=Range(least=0, most=1, use="DeepSeek-V3 predicts one more token, use 1"),
            mtp_weight=Range(least=0, most=100, use="DeepSeek-V3 used 0.3"),
            norm_eps=Range(above=0, most=1),
            init_std=Range(above=0, most=100),
            max_seq_len=Range(least=1, most=2**24),  # to there positions are exact in FP32
        )
        self._check_multiples()
        self.router.check(self.experts.num_experts)
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} must be between 0 and "
                f"num_layers={self.num_layers}: use {self.num_layers} or less"
            )
        legal = sorted({layer for layer in self.dense_layers if self.num_dense_layers <= layer < self.num_layers})
        if list(self.dense_layers) != legal:
            raise ValueError(
                f"model.dense_layers={shown(list(self.dense_layers))} must ascend, from "
                f"num_dense_layers={self.num_dense_layers} to {self.num_layers - 1}, the last layer: use {shown(legal)}"
            )

    def _check_multiples(self) -> None:
        sizes = {
            "dim": self.dim,
            "dense_hidden": self.dense_hidden,
            "experts.hidden": self.experts.hidden,
            **{f"attention.{name}": size for name, size in self.attention.fp8_sizes().items()},
        }
        for name, size in sizes.items():
            if size % FP8_MULTIPLE:
                nearest = max(FP8_MULTIPLE, round(size / FP8_MULTIPLE) * FP8_MULTIPLE)
                raise ValueError(
                    f"model.{name}={size} must be a multiple of {FP8_MULTIPLE}, which FP8 needs: use {nearest}"
                )

    def is_dense(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0; the MTP module's block is number `num_layers`) has a dense MLP."""
        return layer < self.num_dense_layers or layer in self.dense_layers

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the main model's layers with experts, ascending."""
        return tuple(layer for layer in range(self.num_layers) if not self.is_dense(layer))

    @property
    def has_experts(self) -> bool:
        """Whether any block, the MTP module's included, is a mixture of experts."""
        return not all(self.is_dense(layer) for layer in range(self.num_layers + self.mtp_depth))
