"""The base class of torch's batch norms, which has no public name."""

from torch import nn

from twoviews.batch_norms import BatchNorm, SplitBatchNorm, SyncBatchNorm


def test_all_batch_norms_have_the_base_class() -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SplitBatchNorm, SyncBatchNorm)
    assert all(issubclass(kind, BatchNorm) for kind in kinds)
    assert not any(issubclass(kind, BatchNorm) for kind in (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d))
