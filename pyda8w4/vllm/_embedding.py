"""Embeddings, and heads, which may share their weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from pyda8w4._packed import PackedWeight
from pyda8w4.torch import DA8W4Embedding, DA8W4Linear
from pyda8w4.vllm._method import Cut, WeightMethod, packed_of
from pyda8w4.vllm._options import Options


class EmbeddingMethod(WeightMethod):
    """A part of the vocabulary.

    Parameters
    ----------
    options : Options
        How.
    prefix : str
        The layer's name.
    """

    def __init__(self, options: Options, prefix: str) -> None:
        super().__init__(options, prefix, quantizes=False)
        self._tied: Any = None

    def _float_method(self) -> QuantizeMethodBase:
        return UnquantizedEmbeddingMethod()

    def _pack(self, layer: nn.Module, loaded: torch.Tensor, *shard: Any) -> dict[int, PackedWeight]:
        wanted = (layer.org_vocab_size, layer.embedding_dim)
        if tuple(loaded.shape) != wanted:
            raise ValueError(f"its weight must be {wanted}, got {tuple(loaded.shape)}")
        if layer.num_embeddings != layer.org_vocab_size:
            raise ValueError("packed embeddings take no tokens of adapters")
        own = layer.shard_indices
        return {
            0: packed_of(loaded, self.options)(Cut(slice(own.org_vocab_start_index, own.org_vocab_end_index), 0, 1))
        }

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Share the weight of the embedding, once that is loaded.

        Parameters
        ----------
        layer : torch.nn.Module
            A head.
        embed_tokens : torch.nn.Module
            The embedding.

        Returns
        -------
        torch.nn.Module
            The head.
        """
        self._tied = embed_tokens
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make products of what was loaded, or of the embedding's."""
        if self._tied is None:
            super().process_weights_after_loading(layer)
            return
        embedding = self._tied
        if isinstance(embedding.quant_method, EmbeddingMethod) and not hasattr(embedding, "rows"):
            embedding.quant_method.process_weights_after_loading(embedding)
        layer.weight = embedding.weight
        if hasattr(embedding, "rows"):
            self._finish(layer, [embedding.rows.packed])
            layer.head.share_tensors(embedding.rows)
        else:
            layer.quant_method = self._float_method()
            layer.quant_method.process_weights_after_loading(layer)

    def _finish(self, layer: nn.Module, packed: Sequence[PackedWeight]) -> None:
        if isinstance(layer, ParallelLMHead):
            n = packed[0].shape[0]
            bias = None if layer.bias is None else layer.bias.data[:n]
            layer.head = DA8W4Linear.from_packed(packed[0], bias, act=self.options.act, dtype=self._sizes.dtype)
        else:
            layer.rows = DA8W4Embedding.from_packed(packed[0], dtype=self._sizes.dtype)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply by the weight of a head.

        Parameters
        ----------
        layer : torch.nn.Module
            Of vLLM.
        x : (..., K) torch.Tensor
            Hidden states.
        bias : torch.Tensor, optional
            That of the layer, which has been added if it has one.

        Returns
        -------
        torch.Tensor
            Logits of this rank's tokens; those of tokens that only fill up its part are 0.
        """
        logits: torch.Tensor = layer.head(x)
        missing = layer.num_embeddings_per_partition - logits.shape[-1]
        return pad(logits, (0, missing)) if missing and layer.tp_size > 1 else logits

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Look up tokens.

        Parameters
        ----------
        layer : torch.nn.Module
            Of vLLM.
        input_ : torch.Tensor
            Numbers of tokens, of this rank.

        Returns
        -------
        torch.Tensor
            Their vectors.
        """
        rows: torch.Tensor = layer.rows(input_)
        return rows
