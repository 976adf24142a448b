"""Sentences for what pydantic refuses."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from magnetar.data.errors import all_problems, first_problem


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int = Field(default=1, ge=1)
    limit: int = 9

    @model_validator(mode="after")
    def _fits(self) -> "_Part":
        if self.size > self.limit:
            raise ValueError(f"size={self.size} exceeds limit={self.limit}: use a smaller one")
        return self


class _Whole(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    part: _Part = _Part()


def refused(content: Any) -> ValidationError:
    """The error about a whole file."""
    with pytest.raises(ValidationError) as caught:
        _Whole.model_validate_json(content if isinstance(content, bytes) else json.dumps(content))
    return caught.value


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ({}, ["run.name is missing"]),
        ({"name": "a", "nam": 1}, ["run.nam is not a key that this version knows"]),
        ({"name": 3}, ["run.name=3: it should be a valid string"]),
        ({"name": "a", "part": [1]}, ["run.part=[1]: it should be an object"]),
        (
            {"name": "a", "part": {"size": 12}},
            ["run.part: size=12 exceeds limit=9: use a smaller one"],
        ),
        (
            {"part": {"size": 0}},
            ["run.name is missing", "run.part.size=0: it should be greater than or equal to 1"],
        ),
        ({"name": ["a" * 99]}, [f'run.name=["{"a" * 58}...: it should be a valid string']),
    ],
    ids=str,
)
def test_each_key_has_a_sentence_with_its_value_and_its_rule(
    content: Any, sentences: list[str]
) -> None:
    error = refused(content)
    assert all_problems(error, "run") == sentences
    assert first_problem(error, "run") == sentences[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"{", "the whole file: Invalid JSON: "), ([], "the whole file: it should be an object")],
)
def test_what_is_no_object_is_wrong_as_a_whole(content: Any, sentence: str) -> None:
    assert first_problem(refused(content)).startswith(sentence)
