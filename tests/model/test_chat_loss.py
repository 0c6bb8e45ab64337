"""The loss of packed conversations is that of `transformers` on each alone, with the labels of its own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from fp8moe.data.build import open_data
from fp8moe.data.packing import Dataset
from fp8moe.data.sources import DataConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.model.transformer import Transformer, init_weights
from tests.data.chats import MARKED, TURNS, chat_tokenizer, exchange, write_rows
from tests.model.hf_oracle import BASE, hf_names, pair, randomize
from tests.model.shapes import changed

SEQ_LEN, VOCABULARY = 96, 300
CONVERSATIONS = [
    TURNS,
    exchange("what is 1+2", "1+2=3")["messages"],
    exchange("be brief", "yes")["messages"],
    TURNS[1:],
]


def opened(folder: Path, conversations: list[Any]) -> Dataset:
    """A data set of whole conversations in samples of SEQ_LEN + 1 tokens."""
    path = write_rows(folder / "chat.jsonl", [{"messages": one} for one in conversations])
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    config = DataConfig(
        source="chat", paths=(str(path),), validation_paths=(str(path),), tokenizer=str(folder / "tokenizer.json"),
        chat_template="chatml", vocab_size=VOCABULARY, document_mask=True, packing="documents",
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    return open_data(config, seq_len=SEQ_LEN, seed=0).train


def gradients(model: Transformer, dataset: Dataset, counts: LossCounts) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of an epoch in one batch, of the next token and, where the model has it, of the one after; gradients."""
    model.main_grads.zero_()
    batch = dataset.batch(range(len(dataset)))
    loss = total_loss(model(batch), loss_weights(counts, mtp_weight=0.3, balance_alpha=0.0))
    loss.backward()
    return float(loss.detach()), {name: p.main_grad.clone() for name, p in model.named_parameters()}


def counts_of(dataset: Dataset) -> LossCounts:
    batch = dataset.batch(range(len(dataset)))
    return LossCounts(*count_predicted(batch.labels_BS), sequences=len(dataset))


def labels_of_transformers(tokenizer: Tokenizer, conversation: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) [1, S] by the chat template of transformers' own tokenizer; it shifts labels in the model."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=MARKED)
    found = theirs.apply_chat_template(conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor([found["input_ids"]])
    return ids, ids.masked_fill(torch.tensor([found["assistant_masks"]]) == 0, -100)


def test_loss_and_gradients_are_those_of_transformers_one_conversation_at_a_time(tmp_path: Path) -> None:
    config: ModelConfig = changed(BASE, vocab_size=VOCABULARY, max_seq_len=SEQ_LEN)
    ours, theirs = pair(config)
    dataset = opened(tmp_path, CONVERSATIONS)
    assert 1 < len(dataset) < len(CONVERSATIONS), "several samples, of which one holds several conversations"
    counts, tokenizer = counts_of(dataset), chat_tokenizer()
    loss, grads = gradients(ours, dataset, counts)

    theirs.train()
    expected, num_labels = 0.0, 0
    for conversation in CONVERSATIONS:
        ids, labels = labels_of_transformers(tokenizer, conversation)
        predicted = int((labels[:, 1:] != -100).sum())
        share = theirs(input_ids=ids, labels=labels).loss * predicted / counts.main_tokens
        share.backward()
        expected, num_labels = expected + float(share.detach()), num_labels + predicted
    assert num_labels == counts.main_tokens
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, grad in hf_names(config, grads).items():
        reference = theirs.get_parameter(name).grad
        assert reference is not None, name
        distance = (grad - reference).norm() / reference.norm().clamp(min=1e-12)
        assert distance <= 1e-4, f"{name}: {distance:.2e}"


def test_packed_is_unpacked_with_the_mtp_module_too(tmp_path: Path) -> None:
    config: ModelConfig = changed(BASE, vocab_size=VOCABULARY, max_seq_len=SEQ_LEN, mtp_depth=1)
    model = Transformer(config, Recipe(Precision.FP32), LocalDispatcher(config.experts.num_experts))
    init_weights(model, 0)
    randomize(model)
    packed = opened(tmp_path, CONVERSATIONS)
    counts = counts_of(packed)
    loss, grads = gradients(model, packed, counts)
    apart, sums = 0.0, {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for number, conversation in enumerate(CONVERSATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        alone, more = gradients(model, opened(folder, [conversation]), counts)
        apart += alone
        for name, grad in more.items():
            sums[name] += grad
    assert counts.mtp_tokens > 0 and loss == pytest.approx(apart, rel=1e-5)
    for name, grad in grads.items():
        assert (grad - sums[name]).norm() <= 1e-4 * grad.norm().clamp(min=1e-9), name
