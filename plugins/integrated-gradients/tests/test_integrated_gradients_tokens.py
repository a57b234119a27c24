"""Scores of tokens and their page."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

from kexue.core.errors import ArgumentError
from kexue_integrated_gradients import token_scores, tokens_page


class Page(HTMLParser):
    """What a browser would show of a page, and what it would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not {"src", "href", "onclick"} & given.keys()
        if tag == "span":
            self.spans.append((given["style"] or "", given["title"] or "", ""))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["span"] and self.spans and not self.spans[-1][2]:
            style, title, _ = self.spans[-1]
            self.spans[-1] = (style, title, data)
        self.words.append(data)


def test_pools_vectors() -> None:
    values = torch.tensor([[[3.0, -4.0], [1.0, 1.0]]])
    assert token_scores(values).tolist() == [[-1.0, 2.0]]
    assert token_scores(values, "l2").tolist() == [[5.0, pytest.approx(2**0.5)]]
    assert token_scores(values, "absmax").tolist() == [[4.0, 1.0]]


@pytest.mark.parametrize(
    ("values", "pooling", "words"),
    [
        (torch.zeros(2, 3), "mean", "`pooling` must be 'sum', 'l2' or 'absmax'. Found 'mean'"),
        (torch.zeros(2, 0), "sum", r"`values` must have shape .*Found \[2, 0\]"),
        (torch.tensor(1.0), "sum", r"Found \[\]"),
    ],
)
def test_refuses_what_cannot_be_pooled(values: torch.Tensor, pooling: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        token_scores(values, pooling)  # type: ignore[arg-type]


def test_colours_tokens_by_sign_and_size() -> None:
    page = Page(tokens_page([["good", "dull", "the"]], [[2.0, -1.0, 0.0]]))
    assert page.spans == [
        ("background:rgba(214,39,40,0.800)", "+2", "good"),
        ("background:rgba(31,119,180,0.400)", "-1", "dull"),
        ("background:rgba(31,119,180,0.000)", "+0", "the"),
    ]


def test_escapes_everything() -> None:
    evil = "<script>alert('x')</script>\"&amp;"
    page = Page(tokens_page([[evil, "电影"]], [torch.ones(2)], [evil], title=evil))
    assert "script" not in page.tags
    assert page.spans[0][2] == evil
    assert page.words.count(evil) == 4  # two titles, the caption, the token
    assert page.spans[1][2] == "电影"


def test_texts_may_be_empty_or_without_weight() -> None:
    page = Page(tokens_page([[], ["a"]], [[], [0.0]]))
    assert [span[2] for span in page.spans] == ["a"]


@pytest.mark.parametrize(
    ("scores", "captions", "words"),
    [
        ([[1.0]], (), r"`scores` must have one score per token, \[2\]. Found \[1\]"),
        ([[1.0, 2.0]], ("a", "b"), "`captions` must have one line per text, 1. Found 2"),
    ],
)
def test_refuses_what_does_not_agree(
    scores: list[list[float]], captions: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        tokens_page([["a", "b"]], scores, captions)
