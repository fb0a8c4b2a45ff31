"""Batch norm statistics of the data: exact, and over all ranks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from toys import Net

from distinit_plugin.engine.precise_bn import update_bn_statistics

CPU = torch.device("cpu")


def views(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"rgb": 5 + 2 * seed + torch.randn(count, 3, 2, 3, 3, generator=generator)}


def test_statistics_are_those_of_all_values():
    """Batches of different sizes and means; the population's variance, not a mean of variances."""
    net = Net()
    batches = [views(count, seed) for seed, count in enumerate((4, 1, 3))]
    weights = {name: parameter.clone() for name, parameter in net.named_parameters()}
    assert update_bn_statistics(net, iter(batches), 3) == 3
    inputs = net.conv(torch.cat([batch["rgb"] for batch in batches])).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.bn.running_mean.double(), inputs.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.bn.running_var.double(), inputs.var(1, unbiased=False), rtol=1e-4, atol=1e-5)
    assert net.bn.momentum == 0.1
    assert net.bn.num_batches_tracked == 0
    assert not net.bn._forward_hooks
    torch.testing.assert_close(dict(net.named_parameters()), weights, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_no_more_batches_than_asked_and_no_fewer_than_there_are():
    net, other = Net(), Net()
    other.load_state_dict(net.state_dict())
    source = iter([views(2, seed) for seed in range(5)])
    assert update_bn_statistics(net, source, 2) == 2
    assert len(list(source)) == 3
    assert update_bn_statistics(other, [views(2, 0), views(2, 1)], 99) == 2
    torch.testing.assert_close(net.bn.running_var, other.bn.running_var, rtol=0, atol=0)


def test_frozen_layers_and_empty_data_change_nothing():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert update_bn_statistics(net, [], 2) == 0
    net.bn.eval()
    assert update_bn_statistics(net, [views(2, 0)], 2) == 0
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_a_failing_batch_leaves_the_network_as_it_was():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def broken():
        yield views(2, 0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        update_bn_statistics(net, broken(), 5)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert net.bn.momentum == 0.1
    assert not net.bn._forward_hooks


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm3d(3, affine=False)

        def forward(self, batch: dict[str, Tensor]) -> None:
            self.bn(batch["rgb"])
            self.bn(3 * batch["rgb"])

    net, batch = Twice(), views(2, 0)
    update_bn_statistics(net, [batch], 1, autocast=nullcontext)
    both = torch.cat([batch["rgb"], 3 * batch["rgb"]]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.bn.running_mean, both.mean(1))
    torch.testing.assert_close(net.bn.running_var, both.var(1, unbiased=False))


def test_ranks_share_their_sums():
    """Two ranks by hand: what one would receive is the sum of what both send."""
    sent: list[Tensor] = []
    nets = [Net(), Net(), Net()]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    update_bn_statistics(nets[0], [views(3, 0)], 1, all_reduce_sum=lambda sums: sent.append(sums) or sums)
    update_bn_statistics(nets[1], [views(2, 1)], 1, all_reduce_sum=lambda sums: sums + sent[0])
    update_bn_statistics(nets[2], [views(3, 0), views(2, 1)], 2)
    torch.testing.assert_close(nets[1].bn.running_mean, nets[2].bn.running_mean)
    torch.testing.assert_close(nets[1].bn.running_var, nets[2].bn.running_var)
