"""The MTP module by its formula, with norms that all differ: values and gradients in FP32.

    x = W [norm(e) * b ; norm(h) * a]        the next token's embedding first, then the hidden state
    logits = head(norm(block(x)) * c)

The block, its final norm and the head are `transformers`' DeepSeek-V3 of one layer, whose input is x.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Recompute
from fp8moe.model.loss import IGNORE
from fp8moe.model.transformer import Mtp, Transformer, init_weights
from tests.model.batches import Tokens, tokens
from tests.model.hf_oracle import BASE, hf_names, randomize, transformers_model
from tests.model.passes import NOTHING
from tests.model.shapes import changed

CONFIG = changed(BASE, num_layers=2, mtp_depth=1)
ONE_LAYER = changed(BASE, num_layers=1, num_dense_layers=0)
B, S, D = 2, 12, CONFIG.dim


def build(recompute: frozenset[Recompute]) -> tuple[Transformer, Mtp, DeepseekV3ForCausalLM]:
    """Ours, its MTP module, and the one-layer model of `transformers` that has the module's block, norm and head."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, Recipe(Precision.FP32, recompute), LocalDispatcher(CONFIG.experts.num_experts))
    init_weights(model, seed=0)
    mtp = model.mtp
    assert mtp is not None
    randomize(model)
    return model, mtp, transformers_model(ONE_LAYER, as_one_layer(model.state_dict()))


def as_one_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or gradients) of the module's block, its final norm and the head, as those of a one-layer model."""
    block = {name.replace("mtp.block.", "blocks.0."): x for name, x in state.items() if name.startswith("mtp.block.")}
    ends = {name: state[name] for name in ("embedding.weight", "head.weight")}
    return block | ends | {"norm.weight": state["mtp.final_norm.weight"]}


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * gain


def close(got: Tensor | None, want: Tensor | None, name: str) -> None:
    assert got is not None and want is not None, name
    assert (got - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("recompute", [NOTHING, FULL_RECOMPUTE], ids=["kept", "recomputed"])
def test_the_module_is_its_formula(recompute: frozenset[Recompute]) -> None:
    model, mtp, oracle = build(recompute)
    assert model.head is not None
    hidden, embedded = torch.randn(2, B * S, D)
    dy = torch.randn(B * S, CONFIG.vocab_size)
    ours = [t.clone().requires_grad_() for t in (hidden, embedded)]
    out, _ = mtp(*ours, model.positions(torch.arange(S).expand(B, -1)))
    logits = model.head(out)
    logits.backward(dy)

    theirs = [t.clone().requires_grad_() for t in (hidden, embedded)]
    names = ("hidden_norm.weight", "embedding_norm.weight", "join.weight")
    a, b, join = (mtp.get_parameter(name).detach().clone().requires_grad_() for name in names)
    joined = torch.cat([normed(theirs[1], b), normed(theirs[0], a)], -1) @ join.T
    expected = oracle(inputs_embeds=joined.unflatten(0, (B, S))).logits.flatten(0, 1)
    expected.backward(dy)

    close(logits.detach(), expected.detach(), "logits")
    for name, x, want in zip(("hidden", "embedding"), ours, theirs, strict=True):
        close(x.grad, want.grad, name)
    for name, want in zip(names, (a, b, join), strict=True):
        close(mtp.get_parameter(name).main_grad, want.grad, name)  # type: ignore[arg-type]
    gradients = {name: parameter.main_grad for name, parameter in model.named_parameters()}
    for name, grad in hf_names(ONE_LAYER, as_one_layer(gradients)).items():  # type: ignore[arg-type]
        if name != "model.embed_tokens.weight":
            close(grad, oracle.get_parameter(name).grad, name)


def batch() -> Tokens:
    """Labels with gaps: an unpredicted token in the middle, one at the end."""
    made = tokens(CONFIG.vocab_size, B, S)
    labels = made.labels_BS.clone()
    labels[0, 4] = labels[1, -1] = IGNORE
    return Tokens(made.inputs_BS, labels, made.positions_BS)


def test_the_module_gets_the_last_hidden_state_and_the_next_tokens() -> None:
    """Its loss in the whole model: hidden states behind the final norm, embeddings of i+1, labels of i+2."""
    model, mtp, _ = build(NOTHING)
    assert model.embedding is not None and model.head is not None
    made = batch()
    sums = model(made)
    positions = model.positions(made.positions_BS)
    hidden, balance = model.run_blocks(model.embedding(made.inputs_BS.flatten()), positions)
    following = torch.cat([made.inputs_BS[:, 1:], made.labels_BS[:, -1:].clamp(min=0)], 1)
    assert model.norm is not None
    behind = normed(hidden, model.norm.weight)
    out, mtp_balance = mtp(behind, model.embedding.weight[following].flatten(0, 1), positions)
    log_probabilities = model.head(out).log_softmax(-1).unflatten(0, (B, S))
    terms = [
        -log_probabilities[b, i, made.labels_BS[b, i + 1]]
        for b in range(B)
        for i in range(S - 1)
        if made.labels_BS[b, i] != IGNORE and made.labels_BS[b, i + 1] != IGNORE
    ]
    assert len(terms) == 2 * (S - 1) - 2 - 1
    torch.testing.assert_close(sums.mtp, torch.stack(terms).sum())
    torch.testing.assert_close(sums.balance, balance + mtp_balance)
    model.eval()
    assert model(made).mtp == 0 and torch.equal(model(made).balance, balance), "only training predicts one more"
