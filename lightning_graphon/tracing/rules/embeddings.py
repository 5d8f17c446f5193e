"""Embeddings: rows of a table, by the samples' tokens or by constant numbers."""

import torch

from lightning_graphon.tracing.steps import Embedding, Input
from lightning_graphon.tracing.tracer import Call, Tracer, refusal, rule
from lightning_graphon.tracing.views import encode


@rule("embedding")
def _embedding(tracer: Tracer, call: Call) -> None:
    tokens, weight = call.argument(0, "input"), call.argument(1, "weight")
    if call.argument(3, "max_norm") is not None:
        raise refusal(f"{call.label} with max_norm")
    name = tracer.weight_name(weight, "weight", call.label)
    batched = tracer.follows(tokens)
    if batched:
        view = tracer.view(tokens)
        if not isinstance(view.step, Input):
            raise refusal(f"{call.label} of computed tokens")
        place, sample, entries = view.position, view.sample, view.step.entries[0]
    else:
        words, place = tokens.cpu().unique(return_inverse=True)
        sample, entries = torch.zeros_like(place), words
    padding = call.argument(2, "padding_idx")
    step = Embedding(
        call.label, tracer.new_units(weight.shape[1]), len(entries), (view.index,) if batched else (), batched,
        weight_name=name, weight=weight, tokens=entries if batched else None, words=None if batched else entries,
        padding=None if padding is None else int(padding) % len(weight),
    )  # fmt: skip
    codes = encode(sample[..., None], torch.arange(weight.shape[1]), place[..., None], step)
    if batched:
        tracer.record(call.out, step, codes, [view], lambda t: torch.nn.functional.embedding(t.long(), weight))
    else:
        out = call.out
        tracer.record(out, step, codes, [], lambda: out)
