"""A layer's attention weights, values and outputs, from the calls of its operator."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headprobe.backbone.capture.layer_record import FusedAttention, PlainAttention
from headprobe.backbone.heads.layout import Operator
from headprobe.backbone.heads.trace import CallKind, WatchCalls


@dataclass(frozen=True)
class _OperatorCall:
    """One call of the operator, as it was made."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor


@dataclass(frozen=True)
class AppliedWeights:
    """The weights and values of one call of the operator, and its output; windows are rows.

    Attributes:
        attention: What the weights `[rows, heads, queries, keys]` follow from.
        values: `[rows, heads, keys, head_dim]`.
        outputs: Weights times values, `[rows, heads, queries, head_dim]`.
    """

    attention: FusedAttention | PlainAttention
    values: Tensor
    outputs: Tensor


class WatchOperator(WatchCalls):
    """Notes the operator's calls, and the softmax before them, while entered around one call of a layer.

    Args:
        operator: Which calls are the operator's.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(self._note)
        self.operator = operator
        self._count = 0
        self._calls: list[_OperatorCall] = []
        # input and result of the last softmax: before each of the operator's calls, and so far
        self._softmaxes: list[tuple[Tensor, Tensor]] = []
        self._softmax: tuple[Tensor, Tensor] | None = None

    def _note(self, kind: CallKind, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        if kind == "softmax":
            self._softmax = (_argument(args, kwargs, 0, "input"), result)
        if kind == self.operator.kind:
            if self._count in self.operator.calls:
                self._calls.append(_OperatorCall(args, kwargs, result))
                if self._softmax is not None:
                    self._softmaxes.append(self._softmax)
            self._count += 1
        return result

    def applied(self) -> list[AppliedWeights]:
        """Return the layer's attention map and its values; two maps where attention is their difference.

        The list is empty where some of the operator's calls were missed.
        """
        if len(self._calls) != len(self.operator.calls):
            return []
        if self.operator.fused:
            return [self._fused(call) for call in self._calls]

        if len(self._softmaxes) != len(self._calls):
            return []
        parts = [self._plain(call, softmax) for call, softmax in zip(self._calls, self._softmaxes, strict=True)]
        return [_joined(parts)] if self.operator.form == "by call" else parts

    def _fused(self, call: _OperatorCall) -> AppliedWeights:
        """Read the arguments of a fused call as the operator does."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
        scale = query.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]

        # a mask of 3 axes (heads among the rows) or 5 (windows) is brought to 4 as the queries are; others broadcast
        if mask is not None and mask.dim() == query.dim() and mask.shape[0] == query.shape[0] and mask.dim() != 4:
            mask = self.operator.rows(mask)

        # [rows, heads, tokens, head_dim] each
        query, key, value, outputs = (self.operator.rows(tensor) for tensor in (query, key, value, call.result))
        if key.shape[1] != query.shape[1]:  # grouped or multiple queries share keys and values
            share = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)

        attention = FusedAttention(query, key, scale, mask, bool(given.get("is_causal")))
        return AppliedWeights(attention, value, outputs)

    def _plain(self, call: _OperatorCall, softmax: tuple[Tensor, Tensor]) -> AppliedWeights:
        """Read a matrix product: weights @ values, or values.mT @ weights.mT."""
        left, right = _argument(call.args, call.kwargs, 0, "input"), _argument(call.args, call.kwargs, 1, "other")
        weights, values, outputs = left, right, call.result
        logits, result = softmax

        # the weights have the shape of the softmax's result; where both factors have, the same memory decides
        if right.mT.shape == result.shape and (left.shape != result.shape or _same(right, result)):
            weights, values, outputs = right.mT, left.mT, call.result.mT

        # the logits count only where their softmax was applied as it is, without dropout or a sum behind it
        own = self.operator.rows(logits) if _same(weights, result) and logits.shape == weights.shape else None
        attention = PlainAttention(own, self.operator.rows(weights))
        return AppliedWeights(attention, self.operator.rows(values), self.operator.rows(outputs))


def _joined(parts: list[AppliedWeights]) -> AppliedWeights:
    """Put heads that were computed one by one together, on axis 1."""
    weights = [part.attention.weights(slice(None), slice(None)) for part in parts]  # [rows, 1, queries, keys] each
    values = torch.cat([part.values for part in parts], dim=1)
    outputs = torch.cat([part.outputs for part in parts], dim=1)
    return AppliedWeights(PlainAttention(None, torch.cat(weights, dim=1)), values, outputs)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors begin at the same place in memory; on the meta device all do."""
    return one.data_ptr() == other.data_ptr()


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """Return an argument, by position or by keyword."""
    return args[place] if len(args) > place else kwargs[name]
