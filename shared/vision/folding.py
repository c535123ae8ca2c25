"""Networks made ready for answering alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shared.vision.architectures import Network


def fold(network: Network) -> Network:
    """The network, which has to be in eval mode, with each batch norm folded into the convolution
    before it; changed in place, and of no use for training any more.

    A norm with fixed statistics is linear in each channel, as a convolution is, so one does for
    both (Jacob et al., "Quantization and Training of Neural Networks", 2018, section 3.2). A norm
    belongs to the convolution that its module lists right before it, which holds for every network
    of `shared.vision.architectures`. One of any other kind is left as it is.
    """
    with torch.no_grad():
        for module in list(network.modules()):
            for (place, first), (next_place, second) in pairwise(list(module.named_children())):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    setattr(module, place, fuse_conv_bn_eval(first, second))
                    setattr(module, next_place, nn.Identity())
    return network.requires_grad_(False)
