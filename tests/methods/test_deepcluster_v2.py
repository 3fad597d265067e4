"""The loss against a loop with images that have no class; bank, clusters and prototypes over epochs."""

import math

import pytest
import torch
from assembled import progress
from torch.nn import functional as nnf

from twoviews.backbones import ResNet
from twoviews.clusters.kmeans import kmeans
from twoviews.errors import BadInput
from twoviews.methods.deepcluster_v2 import UNSEEN, DeepClusterV2, cluster_loss
from twoviews.randomness import seed_of

IMAGES = 40


def prepared(**changes) -> DeepClusterV2:
    torch.manual_seed(0)
    options = {"hidden_dim": 8, "embed_dim": 6, "temperature": 0.1, "clusters": [5, 7, 5]}
    method = DeepClusterV2(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})
    method.prepare(8, 8, IMAGES, 1)
    return method


def embeddings(module) -> torch.Tensor:
    """What stands for embedding the training images."""
    return 3 * torch.randn(IMAGES, 6, generator=torch.Generator().manual_seed(0))


def crops(*sides: int, count: int = 8) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, side, side, generator=drawn) for side in sides]


def test_the_loss_against_a_loop():
    torch.manual_seed(0)
    scores, classes = torch.randn(6, 4), torch.tensor([0, 3, UNSEEN, 1, UNSEEN, 3])
    losses = []
    for row, label in zip((scores / 0.1).tolist(), classes.tolist(), strict=True):
        if label != UNSEEN:
            losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    assert cluster_loss(scores, classes, 0.1, share=0.5).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_batch_in_which_no_image_has_a_class_costs_nothing():
    scores = torch.randn(3, 4, requires_grad=True)
    loss = cluster_loss(scores, torch.full((3,), UNSEEN), 0.1, share=0.5)
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


def test_the_first_e_step_is_spherical_k_means_of_an_extra_pass():
    method = prepared()
    clustered = method.before_epoch(0, embeddings, seed=3)
    x = nnf.normalize(embeddings(None), dim=1)
    assert list(clustered.clusters) == ["head0", "head1", "head2"] and clustered.previous == {}
    for head, k in enumerate((5, 7, 5)):
        clusters = kmeans(x, k, seed=seed_of(3, head, k), spherical=True)
        assert torch.equal(method.assignments[head], clusters.assignment)
        prototypes = method.get_buffer(f"centroids{head}")
        assert torch.equal(prototypes, clusters.centroids)
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(k))


def test_the_loss_is_that_of_all_crops_under_all_heads():
    method = prepared()
    method.before_epoch(0, embeddings, seed=3)
    views, index = crops(16, 16, 8), torch.arange(8, 16)
    features = torch.cat([method.encoder(torch.cat(views[:2])), method.encoder(views[2])])
    z = nnf.normalize(method.projector(features), dim=1)
    expected = torch.stack(
        [
            nnf.cross_entropy(
                z @ method.get_buffer(f"centroids{head}").T / 0.1, method.assignments[head, index].repeat(3)
            )
            for head in range(3)
        ]
    ).mean()
    torch.testing.assert_close(method(views, index).loss, expected)


def test_micro_batches_of_which_some_images_have_no_class_make_the_loss_of_the_batch():
    method = prepared().eval()
    method.before_epoch(0, embeddings, seed=3)
    views, index = crops(16, 16), torch.arange(8, 16)
    method.assignments[:, 9:13] = UNSEEN  # three of the first four images, and one of the others
    halves = [method([view[rows] for view in views], index[rows]).loss for rows in (slice(4), slice(4, 8))]
    torch.testing.assert_close(torch.stack(halves).mean(), method(views, index).loss)


def test_the_next_e_step_clusters_what_the_epoch_saw_and_leaves_out_the_rest():
    method = prepared()
    method.before_epoch(0, embeddings, seed=3)
    first = method.assignments.clone()
    assert not method.seen.any()
    for start in range(0, 32, 8):
        output = method(crops(16, 16), torch.arange(start, start + 8))
        method.after_step(progress(start // 8 + 1, 4, 9), output.rows)
    bank = method.bank.clone()
    assert torch.equal(method.seen.nonzero()[:, 0], torch.arange(32))
    torch.testing.assert_close(bank.norm(dim=2), torch.ones(2, IMAGES))
    assert not torch.equal(bank[0, :32], bank[1, :32])
    starts = [method.get_buffer(f"centroids{head}").clone() for head in range(3)]
    clustered = method.before_epoch(1, embeddings, seed=4)
    assert torch.equal(clustered.index, torch.arange(32))
    assert (method.assignments[:, 32:] == UNSEEN).all()
    for head, k in enumerate((5, 7, 5)):
        rows = bank[head % 2, :32]
        clusters = kmeans(rows, k, seed=seed_of(4, head, k), start=starts[head], spherical=True)
        assert torch.equal(method.assignments[head, :32], clusters.assignment)
        assert torch.equal(clustered.previous[f"head{head}"], first[head, :32])


def test_heads_follow_the_data():
    method = prepared(clusters=None)
    assert method.prepare(8, 8, 50_000, 1) == ["3 heads with 500 + 500 + 500 clusters"]


def test_more_clusters_than_an_epoch_has_images():
    method = prepared()
    method.clusters = [33]
    with pytest.raises(BadInput, match=r"clusters=\[33\] .* use at most 32"):
        method.prepare(8, 8, 39, 1)


@pytest.mark.parametrize("nredo", [1, 4])
def test_starts_of_k_means_can_be_set(nredo):
    method = prepared(nredo=nredo)
    method.before_epoch(0, embeddings, seed=3)
    x, same = nnf.normalize(embeddings(None), dim=1), []
    for head, k in enumerate((5, 7, 5)):
        wanted, other = (
            kmeans(x, k, seed=seed_of(3, head, k), spherical=True, nredo=starts) for starts in (nredo, 5 - nredo)
        )
        assert torch.equal(method.get_buffer(f"centroids{head}"), wanted.centroids)
        same.append(torch.equal(wanted.centroids, other.centroids))
    assert not all(same)
