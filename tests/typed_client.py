"""The public names as other people's code uses them; `mypy --strict` checks that they are typed."""

import torch

import cc_attention
from cc_attention import CrissCrossAttention, CrissCrossAttention3d, ca_map, ca_weight, criss_cross_attention
from libs import (
    ABN,
    InPlaceABN,
    InPlaceABNSync,
    absorb_negative_weights,
    activated_batch_norm,
    fold,
    fold_norms,
    freeze_statistics,
    from_batchnorm,
    to_batchnorm,
    update_statistics,
)

version: str = cc_attention.__version__
x = torch.rand(2, 16, 4, 5)
attended: torch.Tensor = criss_cross_attention(x, x, x)
energies: torch.Tensor = ca_weight(x, x)
gathered: torch.Tensor = ca_map(energies.softmax(1), x)
modules: list[torch.nn.Module] = [CrissCrossAttention(16), CrissCrossAttention3d(16)]
convolution, norm = torch.nn.Conv2d(16, 16, 1), InPlaceABN(16, activation="leaky_relu")
norms: list[ABN] = [norm, InPlaceABNSync(16), from_batchnorm(torch.nn.BatchNorm2d(16))]
folded: torch.nn.Sequential = fold(convolution, norm)
network = torch.nn.Sequential(convolution, norm)
prediction: torch.nn.Sequential = fold_norms(network)
plain: torch.nn.Module = to_batchnorm(network)
state: dict[str, torch.Tensor] = absorb_negative_weights(network, network.state_dict())
freeze_statistics(network)
update_statistics([x], network)
mean, var = torch.zeros(16), torch.ones(16)
normalised: torch.Tensor = activated_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, "identity", 0.01)
