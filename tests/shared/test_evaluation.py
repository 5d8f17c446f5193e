"""Flags inside an analysis, and that they are what they were afterwards."""

import pytest
import torch
from torch import nn

from lightning_graphon._shared.evaluation import eval_semantics, uncompiled

CPU = torch.device("cpu")


def test_compiled_functions_run_as_python():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: 2 * x, backend=backend)
    with uncompiled(nn.Identity()):
        assert compiled(torch.ones(1)).item() == 2
        assert not graphs
    compiled(torch.ones(1))
    assert graphs


def test_recurrent_layers_run_without_cudnn():
    before = torch.backends.cudnn.enabled
    with uncompiled(nn.LSTM(2, 2)):
        assert not torch.backends.cudnn.enabled
    with uncompiled(nn.Linear(2, 2)):
        assert torch.backends.cudnn.enabled == before
    assert torch.backends.cudnn.enabled == before


def test_eval_mode_gradients_and_full_precision_inside():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()  # a flag of its own, which must come back
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), eval_semantics(net, CPU):
        assert not any(module.training for module in net.modules())
        out = net(torch.ones(3, 2))
        assert out.requires_grad
        assert out.dtype == torch.float32
    assert [module.training for module in net.modules()] == [True, True, False, True]


def test_what_is_drawn_inside_does_not_show_outside():
    state = torch.get_rng_state()
    with eval_semantics(nn.Identity(), CPU):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_flags_come_back_after_an_error():
    net = nn.Dropout()
    torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(RuntimeError, match="inside"), eval_semantics(net, CPU):
        raise RuntimeError("inside")
    assert net.training
    assert torch.backends.mha.get_fastpath_enabled()
