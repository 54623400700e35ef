import pytest
import torch

from ecos_pl.pseudo_labels import (
    Alignment,
    Curriculum,
    PseudoLabels,
    aligned,
    flexible_thresholds,
)

CPU = torch.device("cpu")


def test_thresholds_by_hand():
    # Of 100 images 50 are learned as the first class, 25 as the second, 25 as nothing yet.
    found = flexible_thresholds(torch.tensor([50, 25, 0]), 100, 0.9)
    half = 0.5 / (2 - 0.5)
    assert torch.allclose(found, torch.tensor([0.9, 0.9 * half, 0.0]))


def test_thresholds_warm_up_from_zero():
    assert torch.equal(
        flexible_thresholds(torch.zeros(3, dtype=torch.int64), 10, 0.9), torch.zeros(3)
    )
    # 20 of 100 learned: the 80 that are not stand in for the best class.
    found = flexible_thresholds(torch.tensor([20, 0, 0]), 100, 0.9)
    assert float(found[0]) == pytest.approx(0.9 * 0.25 / 1.75)
    everything = flexible_thresholds(torch.tensor([60, 40]), 100, 0.9)
    assert float(everything[0]) == pytest.approx(0.9)


def test_no_threshold_falls_below_the_least():
    found = flexible_thresholds(torch.tensor([50, 25, 0]), 100, 0.9, least=0.5)
    assert torch.allclose(found, torch.tensor([0.9, 0.5, 0.5]))
    assert torch.equal(  # nor does the least lift them above the common one
        flexible_thresholds(torch.zeros(2, dtype=torch.int64), 10, 0.9, least=0.95),
        torch.full((2,), 0.9),
    )


def slow_flexmatch(batches, num_images, num_classes, threshold):
    """Algorithm 1 of Zhang et al. 2021 in plain loops: thresholds before each batch."""
    last = [None] * num_images
    found = []
    for rows, probabilities in batches:
        sigma = [sum(one == c for one in last) for c in range(num_classes)]
        unused = sum(one is None for one in last)
        thresholds = []
        for c in range(num_classes):
            beta = sigma[c] / max(max(sigma), unused)
            thresholds.append(threshold * beta / (2 - beta))
        found.append(thresholds)
        for row, p in zip(rows.tolist(), probabilities.tolist(), strict=True):
            if max(p) > threshold:
                last[row] = p.index(max(p))
    return found


def test_the_curriculum_is_that_of_the_algorithm():
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randperm(40, generator=generator)[:16],
            (3 * torch.randn(16, 4, generator=generator)).softmax(dim=1),
        )
        for _ in range(30)
    ]
    expected = slow_flexmatch(batches, 40, 4, 0.8)
    curriculum = Curriculum(40, 4, CPU)
    for (rows, probabilities), thresholds in zip(batches, expected, strict=True):
        assert curriculum.thresholds(0.8).tolist() == pytest.approx(thresholds, abs=1e-6)
        curriculum.update(rows, probabilities, 0.8)
    assert max(expected[-1]) > 0.5  # something was learned


def test_a_curriculum_goes_on_and_refuses_another_proxy_set():
    curriculum = Curriculum(5, 3, CPU)
    curriculum.update(torch.tensor([4, 0]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 0.9)
    again = Curriculum(5, 3, CPU)
    again.load_state_dict(curriculum.state_dict())
    assert again.record.tolist() == [2, -1, -1, -1, 1]
    assert torch.equal(again.thresholds(0.9), curriculum.thresholds(0.9))
    with pytest.raises(ValueError, match="has seen 5 unlabelled images, here are 6"):
        Curriculum(6, 3, CPU).load_state_dict(curriculum.state_dict())


def test_alignment_by_hand():
    probabilities = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    wanted, mean = torch.tensor([0.2, 0.8]), torch.tensor([0.8, 0.2])
    # The first class is divided by four, the second multiplied.
    expected = torch.tensor([[1 / 17, 16 / 17], [0.225 / 0.625, 0.4 / 0.625]])
    assert torch.allclose(aligned(probabilities, wanted, mean), expected)


def test_alignment_changes_nothing_where_the_frequencies_are_right():
    probabilities = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    mean = probabilities.mean(0)
    assert torch.allclose(aligned(probabilities, mean, mean), probabilities)


def test_alignment_takes_the_mean_of_the_last_128_batches():
    generator = torch.Generator().manual_seed(0)
    batches = torch.rand(150, 8, 3, generator=generator).softmax(dim=2)
    wanted = torch.tensor([0.5, 0.3, 0.2])
    alignment = Alignment(3, CPU)
    for number, batch in enumerate(batches):
        if number == 100:  # a stop and a resume
            state, alignment = alignment.state_dict(), Alignment(3, CPU)
            alignment.load_state_dict(state)
        found = alignment(batch, wanted, batch.mean(dim=0))
        past = batches[max(0, number - 127) : number + 1]
        mean = [sum(float(one[:, k].mean()) for one in past) / len(past) for k in range(3)]
        for row, p in zip(found.tolist(), batch.tolist(), strict=True):
            moved = [p[k] * float(wanted[k]) / mean[k] for k in range(3)]
            assert row == pytest.approx([one / sum(moved) for one in moved], rel=1e-4)


def test_devices_remember_the_same_as_one_that_has_all_images():
    generator = torch.Generator().manual_seed(0)
    probabilities = (4 * torch.randn(12, 8, 3, generator=generator)).softmax(dim=2)
    rows = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(12)])
    wanted = torch.tensor([0.5, 0.3, 0.2])

    def made(gather):
        return PseudoLabels(3, 0.8, num_unlabeled=20, align=True, device=CPU, gather=gather)

    alone, halves = made(lambda rows: rows), []
    for step in range(12):
        found, thresholds = alone(probabilities[step], rows[step], wanted)
        halves.append((found, thresholds))
    for rank in range(2):
        part = slice(4 * rank, 4 * rank + 4)
        queue = []  # what the collectives of a step give, in order
        device = made(lambda rows: queue.pop(0))  # noqa: B023
        for step in range(12):
            found, thresholds = halves[step]
            means = probabilities[step].view(2, 4, 3).mean(dim=1)
            queue += [means.view(2, 1, 3), rows[step].view(2, 4), found.view(2, 4, 3)]
            mine, mine_thresholds = device(probabilities[step, part], rows[step, part], wanted)
            assert not queue
            assert torch.allclose(mine, found[part], atol=1e-6)
            assert torch.allclose(mine_thresholds, thresholds)


def test_fixmatch_keeps_its_threshold_and_remembers_nothing():
    kept = PseudoLabels(
        3, 0.8, num_unlabeled=None, align=False, device=CPU, gather=lambda rows: rows
    )
    probabilities = torch.eye(3)
    found, threshold = kept(probabilities, torch.arange(3), torch.full((3,), 1 / 3))
    assert torch.equal(found, probabilities)
    assert threshold == 0.8
    assert kept.state_dict() == {}
