"""Each row's token follows its own settings and its own random stream, as transformers would choose it alone."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedConfig
from transformers.generation.utils import GenerationMixin

from pipeline.engines.sampling import Sampler, draw, nucleus_weights, stream_key, uniform
from pipeline.records import Settings

GOLDEN_KEY = -8829620128957328363
GOLDEN_NUMBERS = [0.17935918140756646, 0.11570913174573672, 0.5200151745359104]
NUM_TOKENS = 400  # more than the sampler looks at first, so that the search for a nucleus has to widen

row_settings = st.builds(
    Settings,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7, 25.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 300, 5000]),
    top_p=st.sampled_from([1.0, 0.97, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


def random_logits(num_rows: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * spread


def sampler_of(
    rows: Sequence[Settings], *, prompt: Sequence[int] = (1, 2), keys: Sequence[int] | None = None
) -> Sampler:
    sampler = Sampler(len(rows), NUM_TOKENS)
    for place, row in enumerate(rows):
        sampler.assign(place, row, keys[place] if keys else stream_key(row.seed, place, 0), prompt, ())
    return sampler


def tokens_of(
    rows: Sequence[Settings], logits: torch.Tensor, *, num_steps: int = 1, **kwargs: object
) -> list[list[int]]:
    """The same logits at every step: [row][step]."""
    sampler = sampler_of(rows, **kwargs)  # type: ignore[arg-type]
    places = torch.arange(len(rows))
    return torch.stack([sampler.next_tokens(logits, places) for _ in range(num_steps)], dim=1).tolist()


def processors(row: Settings) -> LogitsProcessorList:
    """What `generate` of transformers itself builds from these settings."""
    config = GenerationConfig(
        do_sample=True,
        temperature=row.temperature,
        top_k=row.top_k,
        top_p=row.top_p,
        min_p=row.min_p,
        repetition_penalty=row.repetition_penalty,
    )
    generator = GenerationMixin()
    generator.config = PreTrainedConfig()  # pyright: ignore
    return generator._get_logits_processor(config, input_ids_seq_length=1)  # pyright: ignore


@settings(deadline=None)
@given(
    st.lists(row_settings, min_size=1, max_size=5), st.integers(0, 10_000), st.lists(st.integers(0, 399), min_size=1)
)
@example([Settings(temperature=25.0, top_p=0.97), Settings(temperature=0.3, top_p=0.5)], 0, [1])
@example([Settings(temperature=1.0, top_p=0.5), Settings(temperature=1.0, top_k=20, top_p=0.5)], 0, [1])
def test_the_distribution_is_that_of_transformers_own_processors(
    rows: list[Settings], seed: int, prompt: list[int]
) -> None:
    logits = random_logits(len(rows), seed)
    scores = logits.clone()
    for place, row in enumerate(rows):
        scores[place] = processors(replace(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0))(
            torch.tensor([prompt]), scores[place : place + 1]
        )
    columns = torch.tensor([[row.temperature, row.top_k, row.top_p, row.min_p] for row in rows], dtype=torch.float64).T
    weights = nucleus_weights(scores, *columns)
    for place, row in enumerate(rows):
        expected = (
            processors(row)(torch.tensor([prompt]), logits[place : place + 1].clone()).softmax(dim=-1)[0].double()
        )
        found = weights[place] / weights[place].sum()
        if ((found > 0) != (expected > 0)).any():
            # Only where a sum of probabilities is so near to top_p that float32, which transformers uses, may cross it.
            before_top_p = processors(replace(row, top_p=1.0, min_p=0.0))(torch.tensor([prompt]), logits[place][None])
            sums = before_top_p.softmax(dim=-1)[0].double().sort(descending=True).values.cumsum(dim=0)
            assert float((sums - row.top_p).abs().min()) < 1e-6
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_the_sampler_penalizes_the_prompt_and_what_it_chose_itself() -> None:
    logits = torch.zeros(1, NUM_TOKENS)
    logits[0, [7, 8, 9]] = torch.tensor([3.0, 2.9, -1.0])
    # 7 was in the prompt: 3.0 / 1.5 = 2.0; 8 wins, is then 1.93; then 7, being seen already, wins for good
    assert tokens_of([Settings(repetition_penalty=1.5)], logits, prompt=[7], num_steps=4) == [[8, 7, 7, 7]]


def test_a_negative_score_is_penalized_downwards() -> None:
    logits = torch.full((1, NUM_TOKENS), -5.0)
    logits[0, [7, 8]] = torch.tensor([-1.0, -1.2])
    assert tokens_of([Settings(repetition_penalty=1.5)], logits, prompt=[7]) == [[8]]


@pytest.mark.parametrize(
    "row",
    [
        Settings(temperature=1.0),
        Settings(temperature=0.7, top_k=5),
        Settings(temperature=1.3, top_p=0.8),
        Settings(temperature=1.0, top_k=40, top_p=0.9, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution(row: Settings) -> None:
    """Chi-square over 40 steps of 200 streams at fixed seeds; 0.999 quantile by Wilson and Hilferty."""
    logits = random_logits(1, seed=5).expand(200, -1)
    drawn = torch.tensor(tokens_of([row] * 200, logits, num_steps=40)).flatten()
    columns = torch.tensor([[row.temperature, row.top_k, row.top_p, row.min_p]], dtype=torch.float64).T
    weights = nucleus_weights(logits[:1], *columns)[0]
    expected = weights / weights.sum() * len(drawn)
    counts = torch.bincount(drawn, minlength=NUM_TOKENS).double()
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
    expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    used = expected > 0
    chi_square = float(((observed - expected)[used] ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def test_the_streams_of_items_samples_seeds_and_steps_are_uniform_and_unrelated() -> None:
    keys = [stream_key(seed, index, sample) for seed in (0, 1) for index in range(50) for sample in (0, 1)]
    assert len(set(keys)) == len(keys)
    numbers = uniform(torch.tensor(keys)[:, None].expand(-1, 500), torch.arange(500).expand(len(keys), -1))
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 149  # 0.999 quantile of chi-square, 99 degrees of freedom
    correlations = torch.corrcoef(numbers)  # between streams; deviation 1 / sqrt(500)
    assert float((correlations - torch.eye(len(keys))).abs().max()) < 0.25
    following = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[
        0, 1
    ]  # 1 / sqrt(99,800)
    assert abs(float(following)) < 0.012


def test_the_streams_stay_what_they_are() -> None:
    """A run begun with one version is resumed with another: these numbers may never change."""
    assert stream_key(0, 0, 0) == GOLDEN_KEY
    assert uniform(torch.tensor([GOLDEN_KEY] * 3), torch.arange(3)).tolist() == GOLDEN_NUMBERS


@settings(deadline=None, max_examples=40)
@given(st.data(), st.lists(row_settings | st.just(Settings()), min_size=2, max_size=6), st.integers(0, 1000))
def test_a_row_does_not_know_its_neighbours(data: st.DataObject, rows: list[Settings], seed: int) -> None:
    logits = random_logits(len(rows), seed)
    keys = [stream_key(row.seed, place, 0) for place, row in enumerate(rows)]
    together = tokens_of(rows, logits, keys=keys, num_steps=3)
    alone = [
        tokens_of([row], logits[place : place + 1], keys=[keys[place]], num_steps=3)[0]
        for place, row in enumerate(rows)
    ]
    assert together == alone
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = tokens_of(
        [rows[place] for place in order], logits[order], keys=[keys[place] for place in order], num_steps=3
    )
    assert shuffled == [together[place] for place in order]


def test_rows_that_are_left_out_do_not_move_on_and_an_assigned_row_starts_anew() -> None:
    row = Settings(temperature=1.5)
    logits = random_logits(2, seed=3)
    expected = tokens_of([row] * 2, logits, num_steps=4)
    sampler = sampler_of([row] * 2)
    assert sampler.next_tokens(logits, torch.tensor([0, 1])).tolist() == [expected[0][0], expected[1][0]]
    assert sampler.next_tokens(logits[1:], torch.tensor([1])).tolist() == [expected[1][1]]
    assert sampler.next_tokens(logits[[1, 0]], torch.tensor([1, 0])).tolist() == [expected[1][2], expected[0][1]]
    sampler.assign(1, row, stream_key(0, 1, 0), (1, 2), ())
    assert sampler.next_tokens(logits, torch.tensor([0, 1])).tolist() == [expected[0][2], expected[1][0]]


def test_an_assigned_row_has_forgotten_the_answer_before() -> None:
    row = Settings(repetition_penalty=1.5)
    logits = torch.zeros(1, NUM_TOKENS)
    logits[0, [7, 8, 9]] = torch.tensor([3.0, 2.9, 2.5])
    sampler, places = sampler_of([row], prompt=[7]), torch.tensor([0])
    assert sampler.next_tokens(logits, places).tolist() == [8]
    sampler.assign(0, row, 1, [8], ())
    assert sampler.next_tokens(logits, places).tolist() == [7]


def test_a_resumed_row_goes_on_where_it_was() -> None:
    row = Settings(temperature=1.2, repetition_penalty=1.2)
    logits = random_logits(1, seed=4)
    expected = tokens_of([row], logits, num_steps=6)[0]
    sampler = Sampler(1, NUM_TOKENS)
    sampler.assign(0, row, stream_key(0, 0, 0), (1, 2), expected[:4])
    assert [sampler.next_tokens(logits, torch.tensor([0])).item() for _ in range(2)] == expected[4:]


def test_a_forced_token_is_taken_and_counts_as_a_step() -> None:
    row = Settings(temperature=1.2)
    logits = random_logits(2, seed=4)
    expected = tokens_of([row] * 2, logits, num_steps=2)
    sampler, places = sampler_of([row] * 2), torch.arange(2)
    assert sampler.next_tokens(logits, places, torch.tensor([-1, 33])).tolist() == [expected[0][0], 33]
    assert sampler.next_tokens(logits, places).tolist() == [expected[0][1], expected[1][1]]


@pytest.mark.parametrize(
    "row",
    [
        Settings(),
        Settings(temperature=1e-6),
        Settings(temperature=5e-324),
        Settings(temperature=1.0, top_p=1e-12),
        Settings(temperature=1.0, top_k=1),
        Settings(temperature=1.0, min_p=1.0),
    ],
)
def test_extreme_settings_choose_the_best_token(row: Settings) -> None:
    logits = random_logits(3, seed=6, spread=30.0)
    assert tokens_of([row] * 3, logits, num_steps=20) == [[best] * 20 for best in logits.argmax(dim=-1).tolist()]


def test_of_equal_scores_the_first_is_greedy_and_all_may_be_drawn() -> None:
    logits = torch.zeros(1, NUM_TOKENS)
    logits[0, [5, 50, 300]] = 2.0
    assert tokens_of([Settings()], logits) == [[5]]
    drawn = tokens_of([Settings(temperature=1.0, top_k=2)], logits, num_steps=60)[0]
    assert set(drawn) == {5, 50, 300}


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_give_no_token_and_leave_neighbours_alone(broken: float, temperature: float) -> None:
    row = Settings(temperature=temperature, top_k=20, top_p=0.9)
    logits = random_logits(3, seed=7)
    expected = tokens_of([row] * 3, logits)
    logits[1] = broken
    assert tokens_of([row] * 3, logits) == [expected[0], [-1], expected[2]]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, NUM_TOKENS), -math.inf)
    logits[0, [0, 399]] = 0.0
    drawn = tokens_of([Settings(temperature=1.0)], logits, num_steps=100)[0]
    assert set(drawn) == {0, 399}


def test_the_ends_of_the_distribution_are_reached_and_not_passed() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64).expand(4, -1)
    uniforms = torch.tensor([2.0**-53, 0.25, 0.25 + 1e-15, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [1, 1, 3, 3]
