"""Frozen networks whose BatchNorm layers measure what they normalise, for judgements that are compiled."""

from __future__ import annotations

from torch import nn

from cvdd.backbones import batchnorm_layers
from cvdd.computing.copies import sharing_copy
from cvdd.computing.fused_bn import FusedBatchNorm, FusedStatistics
from cvdd.computing.fused_dense import MeasuredDenseBlock, measure_once
from cvdd.computing.norm_tracing import with_parts
from cvdd.statistics.bn import BatchStatistics, extras_after, running_moments
from cvdd.support.config_base import ConfigError


def fuse_statistics(network: nn.Module) -> tuple[nn.Module, BatchStatistics]:
    """Return a copy of a frozen network, with parameters shared, whose BatchNorm layers measure what they normalise.

    A network with another kind of BatchNorm, or with layers that keep no running statistics, stays as it is and has
    hooks.
    """
    if not all(_is_known(layer) for _, layer in batchnorm_layers(network)):
        watch = BatchStatistics(network, 1)
        watch.__enter__()
        return network, watch
    fused = sharing_copy(network)
    watch = FusedStatistics(fused)
    measure_once(fused, watch)
    watch.prepare()
    return with_parts(fused, FusedBatchNorm, MeasuredDenseBlock, sums=False), watch


def _is_known(layer: nn.BatchNorm2d) -> bool:
    try:
        running_moments(layer)
        extras_after(layer)
    except ConfigError:
        return False
    return True
