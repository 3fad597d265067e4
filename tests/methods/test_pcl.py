"""ProtoNCE against a loop with images that share clusters; the E-step, its seeds and its state; refusals."""

import math

import pytest
import torch
from torch.nn import functional as nnf

from twoviews.backbones import ResNet
from twoviews.clusters.kmeans import concentration, kmeans
from twoviews.errors import BadInput
from twoviews.methods.moco import info_nce
from twoviews.methods.pcl import PCL, proto_nce
from twoviews.randomness import seed_of

IMAGES = 60


def small(**changes) -> PCL:
    torch.manual_seed(0)
    options = {
        "embed_dim": 6,
        "queue_size": 20,
        "momentum": 0.9,
        "temperature": 0.2,
        "mlp_head": False,
        "bn_splits": 1,
        "clusters": [4, 9],
        "negative_prototypes": None,
        "mask_same_cluster": False,
        "warmup_epochs": 0,
    }
    return PCL(ResNet(3, 16, "basic", [1, 1], width=4), **{**options, **changes})


def prepared(batch_size: int = 4, **changes) -> PCL:
    method = small(**changes)
    method.prepare(batch_size, batch_size, IMAGES, 1)
    return method


def embeddings(module, seed: int = 0) -> torch.Tensor:
    """What stands for embedding the training images; the E-step brings the rows to unit length itself."""
    assert module[0].training
    return 3 * torch.randn(IMAGES, 6, generator=torch.Generator().manual_seed(seed))


def views(count: int = 4) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, 16, 16, generator=drawn) for _ in range(2)]


def by_loop(q, prototypes, phi, clusters: list[int], negatives: list[int], mask: bool) -> float:
    """Image i against the prototypes of all images' clusters and of the negatives, column by column."""
    total = 0.0
    for i, query in enumerate(q):
        logits = {
            j: (query @ prototypes[cluster] / phi[cluster]).item()
            for j, cluster in enumerate([*clusters, *negatives])
            if not (mask and j != i and cluster == clusters[i])
        }
        total += math.log(sum(math.exp(value) for value in logits.values())) - logits[i]
    return total / len(q)


@pytest.mark.parametrize("mask", [False, True])
def test_the_loss_against_a_loop_with_duplicate_clusters(mask):
    method = prepared(batch_size=5, mask_same_cluster=mask)
    method.before_epoch(0, embeddings, seed=3)
    # Two of five images in one cluster of the first clustering.
    part = method.prototypes[0]
    index = torch.cat([(part.assignment == part.assignment[7]).nonzero()[:2, 0], torch.tensor([11, 23, 42])])
    x1, x2 = views(5)
    queue = method.queue.rows.clone()
    q = nnf.normalize(method.projector(method.encoder(x1)), dim=1)
    k = nnf.normalize(method.key_encoder(x2), dim=1)
    expected = []
    for part in method.prototypes:
        clusters = part.assignment[index].tolist()
        negatives = [c for c in range(part.k) if c not in clusters]
        c = nnf.normalize(part.centroids, dim=1)
        expected.append(by_loop(q, c, part.phi, clusters, negatives, mask))
    output = method([x1, x2], index)
    instance = info_nce(q, k, queue, 0.2)
    torch.testing.assert_close(output.metrics["prototype_loss"].item(), sum(expected) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.metrics["instance_loss"], instance.detach())
    torch.testing.assert_close(output.loss.item(), instance.item() + sum(expected) / 2, rtol=1e-5, atol=1e-6)


def test_proto_nce_closed_form():
    """Own prototype equal to the query and orthogonal to the others, each column with its own temperature."""
    eye = torch.eye(4)
    phi = torch.tensor([0.5, 0.1, 0.2, 0.3])
    found = proto_nce(eye[:1], eye, phi, torch.tensor([0]))
    assert found.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=1e-6)


def test_the_e_step_is_k_means_of_unit_rows_with_its_concentration():
    method = prepared()
    clustered = method.before_epoch(0, embeddings, seed=3)
    x = nnf.normalize(embeddings(method.key_encoder), dim=1)
    torch.testing.assert_close(clustered.x, x)
    assert list(clustered.clusters) == ["k4", "k9"] and clustered.previous == {}
    for part in method.prototypes:
        clusters = kmeans(x, part.k, seed=seed_of(3, part.k))
        assert torch.equal(part.assignment, clusters.assignment)
        assert torch.equal(part.centroids, clusters.centroids)
        assert torch.equal(part.phi, concentration(clusters, 0.2))


def test_seeds_belong_to_k_and_epoch_and_not_to_the_place_in_the_list():
    one, other = prepared(clusters=[4, 9]), prepared(clusters=[9, 4])
    for method in (one, other):
        method.before_epoch(0, embeddings, seed=3)
    assert torch.equal(one.prototypes[0].assignment, other.prototypes[1].assignment)
    assert torch.equal(one.prototypes[1].centroids, other.prototypes[0].centroids)


def test_the_second_e_step_starts_from_the_first_and_knows_it():
    method = prepared()
    method.before_epoch(0, embeddings, seed=3)
    first = {f"k{part.k}": part.assignment.clone() for part in method.prototypes}
    second = method.before_epoch(1, lambda module: embeddings(module, seed=1), seed=4)
    assert all(torch.equal(second.previous[name], first[name]) for name in first)
    x = nnf.normalize(embeddings(method.key_encoder, seed=1), dim=1)
    assert torch.equal(second.clusters["k9"].centroids, kmeans(x, 9, seed=seed_of(4, 9), start=first["k9"]).centroids)


def test_warm_up_is_info_nce_alone():
    method = prepared(warmup_epochs=2)
    assert method.before_epoch(0, embeddings, seed=3) is None
    assert method.before_epoch(1, embeddings, seed=3) is None
    x1, x2 = views()
    queue = method.queue.rows.clone()
    expected = info_nce(
        nnf.normalize(method.projector(method.encoder(x1)), dim=1),
        nnf.normalize(method.key_encoder(x2), dim=1),
        queue,
        0.2,
    )
    torch.testing.assert_close(method([x1, x2], torch.arange(4)).loss, expected)
    assert method.before_epoch(2, embeddings, seed=3) is not None
    assert "prototype_loss" in method([x1, x2], torch.arange(4)).metrics


def test_a_checkpoint_remembers_whether_there_are_clusters():
    method, other = prepared(), prepared()
    method.before_epoch(0, embeddings, seed=3)
    other.load_state_dict(method.state_dict())
    assert other.clustered
    x, index = views(), torch.arange(4)
    assert torch.equal(method(x, index).loss, other(x, index).loss)


def test_negative_prototypes_are_drawn_from_clusters_that_no_image_of_the_batch_is_in():
    method = prepared(batch_size=2, clusters=[9], negative_prototypes=3)
    method.before_epoch(0, embeddings, seed=3)
    part = method.prototypes[0]
    positives = part.assignment[torch.tensor([5, 6])]
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        candidates, left_out = method._candidates(part, positives)
        assert torch.equal(candidates[:2], positives) and not left_out.any()
        drawn = candidates[2:].tolist()
        assert len(set(drawn)) == 3 and not set(drawn) & set(positives.tolist())
        seen.update(drawn)
    assert seen == set(range(9)) - set(positives.tolist())


def test_empty_clusters_are_no_negatives():
    method = prepared(clusters=[9])
    method.before_epoch(0, embeddings, seed=3)
    part = method.prototypes[0]
    part.assignment[part.assignment == 8] = 0
    part.fill()
    candidates, left_out = method._candidates(part, part.assignment[:4])
    assert set(candidates[~left_out].tolist()) == set(range(8))
    method.negative_prototypes = 8  # more than there are: the rest is left out
    candidates, left_out = method._candidates(part, part.assignment[:4])
    assert set(candidates[~left_out].tolist()) == set(range(8))


@pytest.mark.parametrize("negatives", [None, 8])
def test_a_checkpoint_knows_the_empty_clusters_though_it_does_not_hold_them(negatives):
    method, other = (prepared(batch_size=1, clusters=[9], negative_prototypes=negatives) for _ in range(2))
    method.before_epoch(0, embeddings, seed=3)
    part = method.prototypes[0]
    part.assignment[part.assignment == 8] = 0
    part.fill()
    assert part.filled.tolist() == [True] * 8 + [False]
    state = method.state_dict()
    assert {name for name in state if name.startswith("prototypes.")} == {
        f"prototypes.0.{name}" for name in ("assignment", "centroids", "phi")
    }  # as older versions wrote them
    other.load_state_dict(state)
    positives = part.assignment[:1]
    found = []
    for one in (method, other):
        torch.manual_seed(0)
        found.append(one._candidates(one.prototypes[0], positives))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert set(found[1][0][~found[1][1]].tolist()) == set(range(8))


def test_a_step_does_not_go_through_the_assignments_of_all_images():
    """Their number would make it slower; what it needs of them is looked up for the images of the batch."""
    method = prepared()
    method.before_epoch(0, embeddings, seed=3)
    x, index = views(), torch.arange(4)
    expected = method(x, index).metrics["prototype_loss"]
    for part in method.prototypes:
        part.assignment[4:] = -1
    torch.testing.assert_close(method(x, index).metrics["prototype_loss"], expected)


def test_numbers_of_clusters_follow_the_data():
    method = small(clusters=None, queue_size=4096)
    notes = method.prepare(512, 512, 50_000, 1)
    assert [part.k for part in method.prototypes] == [250, 500, 1000]
    assert notes == ["250 + 500 + 1,000 clusters from epoch 1 on"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": [4, 61]}, r"clusters=\[4, 61\] .* at most 60"),
        ({"clusters": [4, 4]}, r"clusters=\[4, 4\] has a number twice"),
        ({"negative_prototypes": 2}, "negative_prototypes=2 with 4 clusters.* use null"),
        ({"negative_prototypes": 7, "clusters": [10]}, "use at most 6 or null"),
        ({"queue_size": 61}, "queue_size=61 is larger than the 60 training images"),
        ({"bn_splits": 4}, "bn_splits=4 needs a batch_size"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(BadInput, match=message):
        small(**options).prepare(4, 4, IMAGES, 1)


def test_copies_of_images_leave_the_loss_finite():
    """Two thirds of the images are copies of four; their clusters do not extend, and the others do."""

    def copies(module) -> torch.Tensor:
        return torch.cat([embeddings(module)[:4].repeat(10, 1), embeddings(module)[40:]])

    method = prepared(clusters=[6, 12])
    clustered = method.before_epoch(0, copies, seed=3)
    assert any((found.distance < 1e-10).sum() > 30 for found in clustered.clusters.values())
    for part in method.prototypes:
        assert part.phi.min() >= 0.2 / 10 and part.phi.mean().item() == pytest.approx(0.2, rel=1e-5)
    loss = method(views(), torch.tensor([0, 1, 45, 50])).metrics["prototype_loss"].item()
    assert 0 <= loss < 2 / (0.2 / 10) + math.log(12)


@pytest.mark.parametrize("nredo", [1, 4])
def test_starts_of_k_means_can_be_set(nredo):
    method = prepared(nredo=nredo)
    method.before_epoch(0, embeddings, seed=3)
    x = nnf.normalize(embeddings(method.key_encoder), dim=1)
    for part in method.prototypes:
        assert torch.equal(part.centroids, kmeans(x, part.k, seed=seed_of(3, part.k), nredo=nredo).centroids)
    assert any(
        not torch.equal(part.centroids, kmeans(x, part.k, seed=seed_of(3, part.k), nredo=5 - nredo).centroids)
        for part in method.prototypes
    )
