"""Shuffled images and noise for thoughts: what they keep, what they change, and what they must not depend on."""

from __future__ import annotations

import pytest
import torch

from coconut.evaluation.interventions import image_donors, noise_like_thoughts
from coconut.types import DataError, Sample

from .conftest import ListSource

LATENT = 7


def samples(n: int, without_image: frozenset[int] = frozenset()) -> ListSource:
    return ListSource([Sample(f"k{i}", "?", (), "a", () if i in without_image else (b"x",)) for i in range(n)])


@pytest.mark.parametrize("n", [2, 3, 50])
def test_every_image_goes_to_another_sample_and_each_is_used_once(n: int) -> None:
    for seed in range(20):
        donors = image_donors(samples(n), n, seed)
        assert sorted(donors) == sorted(donors.values()) == list(range(n))
        assert all(index != donor for index, donor in donors.items())


def test_the_seed_decides_the_shuffle() -> None:
    assert image_donors(samples(50), 50, 1) == image_donors(samples(50), 50, 1)
    assert image_donors(samples(50), 50, 1) != image_donors(samples(50), 50, 2)


def test_samples_without_image_take_no_part() -> None:
    donors = image_donors(samples(6, frozenset({1, 4})), 6, 0)
    assert sorted(donors) == sorted(donors.values()) == [0, 2, 3, 5]


def test_only_the_evaluated_samples_take_part() -> None:
    assert set(image_donors(samples(50), 10, 0).values()) == set(range(10))


def test_shuffling_a_single_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 of 3 samples have images"):
        image_donors(samples(3, frozenset({0, 2})), 3, 0)


def prompts(*n_latents: int) -> torch.Tensor:
    """Left-padded prompts; rows end alike, so spans of unequal length begin in different columns."""
    length = 4 + max(n_latents)
    rows = []
    for n in n_latents:
        row = [1, *[LATENT] * n, 2]
        rows.append([0] * (length - len(row)) + row)
    return torch.tensor(rows)


def replaced(ids: torch.Tensor, keys: list[str], thoughts: torch.Tensor, seed: int = 0) -> torch.Tensor:
    transform = noise_like_thoughts(ids, LATENT, keys, seed)
    return torch.cat([transform(thoughts[:, k : k + 1], k) for k in range(thoughts.shape[1])], dim=1)


def test_noise_has_the_norm_of_the_thought_and_not_its_direction() -> None:
    thoughts = torch.randn(2, 3, 64) * torch.tensor([1.0, 10.0, 0.1])[None, :, None]
    noise = replaced(prompts(3, 3), ["a", "b"], thoughts)
    assert torch.allclose(noise.norm(dim=-1), thoughts.norm(dim=-1), rtol=1e-5)
    assert torch.cosine_similarity(noise, thoughts, dim=-1).abs().max() < 0.6
    assert noise.dtype == thoughts.dtype


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    thoughts = torch.ones(3, 3, 16)
    together = replaced(prompts(1, 3, 2), ["a", "b", "c"], thoughts)
    # Row c has two thoughts, in the last two of the batch's three latent columns.
    alone = replaced(prompts(2), ["c"], thoughts[2:, :2])
    assert torch.equal(together[2, 1:], alone[0])
    # ... and row a one, in the last column.
    assert torch.equal(together[0, 2:], replaced(prompts(1), ["a"], thoughts[:1, :1])[0])


def test_noise_differs_between_samples_thoughts_and_seeds() -> None:
    thoughts = torch.ones(2, 2, 16)
    noise = replaced(prompts(2, 2), ["a", "b"], thoughts)
    assert not torch.allclose(noise[0], noise[1])
    assert not torch.allclose(noise[:, 0], noise[:, 1])
    assert not torch.allclose(noise, replaced(prompts(2, 2), ["a", "b"], thoughts, seed=1))
