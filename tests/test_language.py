"""Language models as search sees them, search beside enumeration and beside transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kexue.core.component import PAD
from kexue.core.errors import ArgumentError, WorkError
from kexue.core.interfaces.decoder import DecodeResult
from kexue.core.language import (
    Characters,
    FunctionScorer,
    NextTokenScorer,
    TokenizerVocabulary,
    aligned,
    beam_search,
    check_prompt,
    draw,
    generate,
    masked_scorer,
    next_token_scorer,
    pad_ids,
    select_rows,
    truncate,
)

EOS = 1
TOKENS = 5


def table_model(seed: int, tokens: int = TOKENS, sharpness: float = 2.0) -> FunctionScorer:
    """Return a model whose next token depends on the last two, in float64."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(tokens, tokens, tokens, generator=generator, dtype=torch.float64)

    def logits(ids: Tensor) -> Tensor:
        before = ids[:, -2] if ids.shape[1] > 1 else torch.zeros_like(ids[:, -1])
        return sharpness * table[before, ids[:, -1]]

    return FunctionScorer(logits, eos_id=EOS)


def score(model: FunctionScorer, prompt: list[int], continuation: tuple[int, ...]) -> float:
    """Return the log-probability of a continuation, token by token."""
    ids, total = list(prompt), 0.0
    for token in continuation:
        scores = model.function(torch.tensor([ids])).log_softmax(-1)[0]
        total += float(scores[token])
        ids.append(token)
    return total


def all_continuations(longest: int) -> list[tuple[int, ...]]:
    """Return what ends, within ``longest`` tokens."""
    others = [t for t in range(TOKENS) if t != EOS]
    return [(*rest, EOS) for n in range(longest) for rest in itertools.product(others, repeat=n)]


# -- search ---------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.7, 1.0]))
def test_a_wide_beam_finds_the_best_of_all(seed: int, penalty: float) -> None:
    model = table_model(seed)
    found = beam_search(
        model, torch.tensor([[2, 3]]), width=300, max_new_tokens=4, length_penalty=penalty,
        num_return=3,
    )  # fmt: skip
    ranked = sorted(
        ((score(model, [2, 3], c) / len(c) ** penalty, c) for c in all_continuations(4)),
        reverse=True,
    )[:3]
    assert [tuple(row) for row in found.tolist()] == [c for _, c in ranked]
    wanted = [value * len(c) ** penalty for value, c in ranked]
    torch.testing.assert_close(found.scores, torch.tensor(wanted, dtype=torch.float64))
    assert found.ended is not None
    assert found.ended.all()


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model = table_model(seed)
    prompt = torch.arange(TOKENS)[:, None]
    beam = beam_search(model, prompt, width=1, max_new_tokens=6)
    line = generate(model, prompt, max_new_tokens=6)
    assert beam.tolist() == line.tolist()
    torch.testing.assert_close(beam.scores, line.scores)
    assert torch.equal(beam.ended, line.ended)  # type: ignore[arg-type]


def test_a_wider_beam_finds_what_greedy_search_misses() -> None:
    # The toy of kexue.fm/archives/7259: a, b, c, d are 2 to 5.
    first = {2: 0.6, 4: 0.4}
    second = {2: {3: 0.55, 5: 0.45}, 4: {3: 0.1, 5: 0.9}}

    def model(ids: Tensor) -> Tensor:
        rows = []
        for row in ids.tolist():
            known = {0: {EOS: 1.0}, 1: first, 2: second.get(row[-1], {}), 3: {EOS: 1.0}}[len(row)]
            rows.append([math.log(known[t]) if t in known else -math.inf for t in range(6)])
        return torch.tensor(rows)

    prompt = torch.tensor([[0]])
    one, two = (beam_search(model, prompt, width=w, max_new_tokens=3, eos_id=EOS) for w in (1, 2))
    assert one.tolist() == [[2, 3, EOS]]
    assert two.tolist() == [[4, 5, EOS]]
    assert two.scores.exp().tolist() == pytest.approx([0.36])


@settings(derandomize=True, max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_batch_equals_one_by_one_whatever_the_padding(seed: int, lengths: list[int]) -> None:
    model = table_model(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(TOKENS, (n,), generator=generator).tolist() for n in lengths]
    right, mask = pad_ids(rows, pad_id=4)
    left, left_mask = aligned(right, mask, right=True)
    searches: list[Callable[[Tensor, Tensor | None], DecodeResult]] = [
        lambda p, m: generate(model, p, mask=m, max_new_tokens=5),
        lambda p, m: beam_search(model, p, mask=m, width=3, max_new_tokens=5),
    ]
    for search in searches:
        together, shifted = search(right, mask), search(left, left_mask)
        assert together.tolist() == shifted.tolist()
        for i, row in enumerate(rows):
            alone = search(torch.tensor([row]), None)
            assert alone.tolist() == [together.tolist()[i]]
            torch.testing.assert_close(alone.scores[0], together.scores[i])


def test_rows_that_are_drawn_each_by_their_own_generator_do_not_know_of_each_other() -> None:
    model = table_model(3)
    prompt = torch.tensor([[2], [3], [4]])

    def drawn(rows: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(i) for i in rows]
        found = generate(model, prompt[rows], max_new_tokens=12, choose=draw, generator=generators)
        return found.tolist()

    together = drawn([0, 1, 2])
    assert len({len(row) for row in together}) > 1
    assert [drawn([i])[0] for i in range(3)] == together


def test_the_same_seed_gives_the_same_text() -> None:
    prompt = torch.tensor([[2], [3]])
    once, again, other = (
        generate(
            table_model(3), prompt, max_new_tokens=20, choose=draw, eos_id=[],
            generator=torch.Generator().manual_seed(seed),
        ).tolist()
        for seed in (1, 1, 2)
    )  # fmt: skip
    assert once == again != other


def test_what_is_cut_off_has_not_ended_and_comes_last() -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.log(torch.tensor([[0.6, 0.1, 0.3]])).expand(len(ids), -1)

    found = beam_search(
        model, torch.tensor([[0]]), width=3, max_new_tokens=2, eos_id=EOS, num_return=2
    )
    assert found.ended is not None
    assert found.ended.tolist() == [True, False]
    assert found.tolist() == [[1], [0, 0]]
    assert found.scores.exp().tolist() == pytest.approx([0.1, 0.36])
    line = generate(model, torch.tensor([[0]]), max_new_tokens=2, eos_id=EOS)
    assert line.ended is not None
    assert line.ended.tolist() == [False]


def test_a_hypothesis_that_does_not_exist_is_empty() -> None:
    def model(ids: Tensor) -> Tensor:  # 2, then the end
        only = torch.where(ids[:, -1:] == 2, EOS, 2)
        return torch.full((len(ids), 3), -torch.inf).scatter(1, only, 0.0)

    found = beam_search(
        model, torch.tensor([[0]]), width=2, max_new_tokens=4, eos_id=EOS, num_return=2
    )
    assert found.tolist() == [[2, EOS], []]
    assert found.scores.tolist() == [0.0, -math.inf]


def test_rows_that_have_ended_are_not_computed_further() -> None:
    seen: list[int] = []

    def model(ids: Tensor) -> Tensor:  # a row goes on for as many tokens as it starts with
        seen.append(len(ids))
        goes_on = ids.shape[1] <= ids[:, :1]
        return torch.cat([goes_on * 2.0, torch.ones_like(goes_on)], 1)

    found = generate(model, torch.tensor([[1], [2], [4]]), max_new_tokens=9, eos_id=EOS)
    assert [len(row) for row in found.tolist()] == [2, 3, 5]
    assert seen == [3, 3, 2, 1, 1]


def test_tells_of_tokens_as_they_come() -> None:
    told: list[tuple[list[int], list[int]]] = []
    model = table_model(4)
    found = generate(
        model, torch.tensor([[2], [3]]), max_new_tokens=4,
        on_tokens=lambda rows, tokens: told.append((rows.tolist(), tokens.tolist())),
    )  # fmt: skip
    rebuilt: list[list[int]] = [[], []]
    for rows, tokens in told:
        for row, token in zip(rows, tokens, strict=True):
            rebuilt[row].append(token)
    assert rebuilt == found.tolist()


def test_nothing_to_do() -> None:
    model = table_model(0)
    none = generate(model, torch.zeros(0, 3, dtype=torch.long), max_new_tokens=3)
    assert none.tolist() == []
    assert generate(model, torch.tensor([[2]]), max_new_tokens=0).tolist() == [[]]
    assert beam_search(model, torch.tensor([[2]]), width=2, max_new_tokens=0).tolist() == [[]]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("`prompt` must be token ids", {"prompt": torch.tensor([1, 2])}),
        ("`prompt` must be token ids", {"prompt": torch.tensor([[0.5]])}),
        ("`mask` must be bool", {"mask": torch.ones(1, 2)}),
        ("`prompt` must hold a token.*row 0", {"mask": torch.zeros(1, 2, dtype=torch.bool)}),
        ("`max_new_tokens` must be at least 0", {"max_new_tokens": -1}),
        ("`eos_id` must be one of the model's 5 tokens. Found 7", {"eos_id": 7}),
    ],
)
def test_refuses(words: str, given: dict[str, Any]) -> None:
    model = FunctionScorer(table_model(0).function)
    arguments = {"prompt": torch.tensor([[1, 2]]), "max_new_tokens": 3, **given}
    for search in (generate, lambda *a, **k: beam_search(*a, width=2, **k)):
        with pytest.raises(ArgumentError, match=words):
            search(model, **arguments)


def test_refuses_beams_that_are_none() -> None:
    prompt = torch.tensor([[2]])
    with pytest.raises(ArgumentError, match="`width` must be at least 1"):
        beam_search(table_model(0), prompt, width=0, max_new_tokens=3)
    with pytest.raises(ArgumentError, match=r"`num_return` must be from 1 to `width`, 2. Found 3"):
        beam_search(table_model(0), prompt, width=2, max_new_tokens=3, num_return=3)


@pytest.mark.parametrize("penalty", [-1.0, math.nan, math.inf])
def test_refuses_penalties(penalty: float) -> None:
    with pytest.raises(ArgumentError, match="`length_penalty` must be a finite number"):
        beam_search(
            table_model(0), torch.tensor([[2]]), width=2, max_new_tokens=3, length_penalty=penalty
        )


def test_refuses_what_does_not_fit_the_model() -> None:
    model = FunctionScorer(table_model(0).function, max_length=5, start_id=0)
    prompt = torch.tensor([[2, 3, 4]])
    assert len(generate(model, prompt, max_new_tokens=1).tolist()[0]) == 1
    with pytest.raises(ArgumentError, match=r"reads 5 tokens.*Give at most 1 of them"):
        generate(model, prompt, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="Shorten the prompt"):
        generate(model, prompt.repeat(1, 2), max_new_tokens=2)


def test_scores_that_are_nan_are_an_error() -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.full((len(ids), 3), math.nan)

    for search in (generate, lambda *a, **k: beam_search(*a, width=2, **k)):
        with pytest.raises(WorkError, match="scores are NaN"):
            search(model, torch.tensor([[0]]), max_new_tokens=2)


# -- choosing -------------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.5, 0.2, 0.1, 0.15, 0.05]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.86}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 2, "top_p": 0.8}, [0, 1]),
        ({"top_k": 2, "top_p": 0.7}, [0]),  # of what top_k leaves: 5/7
        ({"temperature": 0}, [0]),
        ({"temperature": 0.25, "top_p": 0.9}, [0]),
    ],
)
def test_truncates(options: dict[str, Any], kept: list[int]) -> None:
    found = truncate(LOGITS, **options)
    assert found.isfinite()[0].nonzero()[:, 0].tolist() == kept
    if "temperature" not in options:
        torch.testing.assert_close(found[0, kept], LOGITS[0, kept])


@pytest.mark.parametrize(("tokens", "scale"), [(50, 1.0), (3000, 1.0), (3000, 5.0)])
def test_truncates_as_transformers_does(tokens: int, scale: float) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(20, tokens, generator=generator, dtype=torch.float64)
    ids = torch.zeros(20, 1, dtype=torch.long)
    for k, p, temperature in ((7, 1.0, 1.0), (0, 0.8, 1.0), (12, 0.6, 0.7)):
        theirs = logits / temperature
        theirs = warpers.TopKLogitsWarper(k)(ids, theirs) if k else theirs
        theirs = warpers.TopPLogitsWarper(p)(ids, theirs) if p < 1 else theirs
        ours = truncate(logits, temperature=temperature, top_k=k, top_p=p)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "given", [{"temperature": -1.0}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_refuses_to_truncate(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ArgumentError, match=f"`{name}` must be"):
        truncate(LOGITS, **given)


def test_draws_from_the_distribution() -> None:
    rows = 40_000
    logits = truncate(LOGITS, top_k=4).float().expand(rows, -1)
    drawn = draw(logits, torch.Generator().manual_seed(0)).bincount(minlength=5)
    wanted = logits[0].softmax(-1) * rows
    assert drawn[4] == 0
    chi_square = ((drawn - wanted)[:4].square() / wanted[:4]).sum()
    assert chi_square < 16.3  # three degrees of freedom, one in a thousand


# -- adapters -------------------------------------------------------------------------------------


def test_a_module_is_a_model() -> None:
    module = nn.Sequential(nn.Embedding(TOKENS, 4), nn.Linear(4, TOKENS))
    found = generate(module, torch.tensor([[2, 3]]), max_new_tokens=4)
    ids = [2, 3]
    for _ in range(4):
        ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    assert found.tolist() == [ids[2:]]


def test_refuses_what_is_no_model() -> None:
    for adapt in (next_token_scorer, lambda m: masked_scorer(m, mask_id=0)):
        with pytest.raises(ArgumentError, match=r"`model` must be.*Found int"):
            adapt(3)
    with pytest.raises(ArgumentError, match="`mask_id` must be given"):
        masked_scorer(nn.Linear(2, 2))


def test_a_scorer_is_returned_as_it_is() -> None:
    scorer = table_model(0)
    assert next_token_scorer(scorer) is scorer
    masked = masked_scorer(lambda ids: ids, mask_id=0)
    assert masked_scorer(masked) is masked


def test_selects_rows_of_anything_nested() -> None:
    cache = {"a": (torch.arange(3), [torch.eye(3), None])}
    found = select_rows(cache, torch.tensor([2, 2, 0, 1]))
    assert found["a"][0].tolist() == [2, 2, 0, 1]
    assert found["a"][1][0].shape == (4, 3)
    with pytest.raises(TypeError, match="holds str needs a scorer with its own `select`"):
        select_rows(("x",), torch.tensor([0]))


def test_aligns_prompts() -> None:
    prompt = torch.tensor([[9, 1, 9, 2], [3, 9, 9, 9]])
    mask = prompt != 9
    ids, real = aligned(prompt, mask)
    assert ids[0].tolist() == [1, 2]
    assert real.tolist() == [[True, True], [True, False]]
    ids, real = aligned(prompt, mask, right=True)
    assert ids.tolist() == [[1, 2], [9, 3]]
    assert check_prompt(prompt).all()


def _gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
        eos_token_id=EOS,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _t5(transformers: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=17, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart(transformers: Any) -> Any:
    config = transformers.BartConfig(
        vocab_size=17, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=64, decoder_start_token_id=2, bos_token_id=0, eos_token_id=EOS,
        pad_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _until_the_end(rows: Tensor) -> list[list[int]]:
    lists = rows.tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in lists]


@pytest.mark.parametrize("make", [_gpt2, _llama, _t5, _bart])
def test_decodes_models_of_transformers_as_they_do(make: Callable[[Any], Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(transformers).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5)  # so that something is to be decided
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 17, (n,), generator=generator).tolist() for n in (6, 4, 5)]
    ids, mask = pad_ids(rows)
    if not model.config.is_encoder_decoder:
        ids, mask = aligned(ids, mask, right=True)
    kept = {"attention_mask": mask.long(), "do_sample": False, "pad_token_id": 0}
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]

    theirs = model.generate(input_ids=ids, max_new_tokens=10, **kept)[:, start:]
    ours = generate(model, ids, mask=mask, max_new_tokens=10)
    assert ours.tolist() == _until_the_end(theirs)
    by_prefix = FunctionScorer(lambda x: model(x).logits, eos_id=EOS)
    if not model.config.is_encoder_decoder:
        assert generate(by_prefix, ids, mask=mask, max_new_tokens=10).tolist() == ours.tolist()

    beams = {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"}
    theirs = model.generate(input_ids=ids, max_new_tokens=10, **kept, **beams)[:, start:]
    found = beam_search(model, ids, mask=mask, width=3, max_new_tokens=10)
    assert found.tolist() == _until_the_end(theirs)
    for i, row in enumerate(rows):
        alone = beam_search(model, torch.tensor([row]), width=3, max_new_tokens=10)
        assert alone.tolist()[0] == found.tolist()[i]


def test_an_empty_prompt_begins_with_the_models_own_token() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = _gpt2(transformers).eval()
    ids, mask = pad_ids([[], [5, 6]])
    found = generate(model, ids, mask=mask, max_new_tokens=4)
    alone = generate(model, torch.tensor([[0]]), max_new_tokens=4)
    assert found.tolist()[0] == alone.tolist()[0]
    model.config.bos_token_id = None
    with pytest.raises(ArgumentError, match="`prompt` must hold a token"):
        generate(model, ids, mask=mask, max_new_tokens=4)
    with pytest.raises(ArgumentError, match="reads 64 tokens"):
        generate(model, ids, mask=mask, max_new_tokens=80)


def test_masked_models_score_the_wanted_positions_only() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    scored: list[tuple[int, ...]] = []
    model.cls.register_forward_hook(lambda *a: scored.append(tuple(a[2].shape)))
    ids, mask = pad_ids([[5, 6, 7, 8], [9, 10]])
    positions = torch.tensor([[0, 3], [1, 0]])
    scorer = masked_scorer(model, mask_id=3)
    found = scorer(ids, mask, positions)
    assert scored == [(2, 2, 17)]
    every = model(ids, attention_mask=mask.long()).logits
    assert every.shape == (2, 4, 17)  # the model is as it was
    for row in range(2):
        torch.testing.assert_close(found[row], every[row, positions[row]])
    by_function = masked_scorer(lambda x: model(x).logits, mask_id=3)
    torch.testing.assert_close(by_function(ids, mask, positions), found)
    assert scorer.max_length == 32


# -- vocabularies ---------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_characters_can_be_read_back(text: str) -> None:
    characters = Characters.of([text])
    ids = characters.encode(text)
    assert characters.decode([characters.bos_id, *ids, characters.eos_id, PAD]) == text
    assert all(len(characters.special_ids) <= i < characters.size for i in ids)


def test_unknown_characters() -> None:
    with pytest.raises(ArgumentError, match="Found '空' in '科空'"):
        Characters("科学").encode("科空")
    replacing = Characters("科学", unknown="replace")
    assert replacing.decode(replacing.encode("科空")) == "科\ufffd"
    with pytest.raises(ArgumentError, match=r"each character once. Found 'a' twice"):
        Characters("aba")
    with pytest.raises(ArgumentError, match="`unknown` must be"):
        Characters("ab", unknown="drop")


def test_tokenizers_of_transformers_are_vocabularies() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "</s>": 1, "[MASK]": 2, "科": 3, "学": 4}
    special = {"eos_token": "</s>", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, special["unk_token"]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    vocabulary = TokenizerVocabulary(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    )
    assert vocabulary.encode("科学") == [3, 4]
    assert vocabulary.decode([3, 4, 1, PAD]).replace(" ", "") == "科学"
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.mask_id) == (5, 1, 2)
    assert vocabulary.bos_id is None


class Echo(NextTokenScorer):
    """A scorer with a state of its own around another: the last token is not repeated."""

    def __init__(self, inner: NextTokenScorer) -> None:
        self.inner = inner
        self.eos_id = inner.eos_id

    def begin(self, prompt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        logits, cache = self.inner.begin(prompt, mask)
        return logits, cache

    def advance(self, cache: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        logits, cache = self.inner.advance(cache, tokens)
        return logits.scatter(1, tokens[:, None], -torch.inf), cache


def test_a_constraint_is_a_scorer_around_a_scorer() -> None:
    found = beam_search(
        Echo(table_model(5)), torch.tensor([[2], [3]]), width=4, max_new_tokens=8, eos_id=[]
    )
    rows = found.tolist()
    assert [len(row) for row in rows] == [8, 8]
    assert all(a != b for row in rows for a, b in itertools.pairwise(row))
