"""What the sections of the JSON are made of: strict models and kinds of numbers.

A key is a field of a section. The text below it is its meaning and unit, for the page of keys and
for messages; a key without a default is required.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import PydanticKnownError

Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class StrictModel(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class StoredModel(StrictModel):
    """A section that earlier versions stored with more keys.

    Attributes:
        retired: those keys, each with the values that describe what happens today. A stored file
            holds them, so a key with one of these values is dropped; any other value is refused.
    """

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        allowed = {name: [(type(v), v) for v in values] for name, values in cls.retired.items()}
        return {
            name: value
            for name, value in section.items()
            if (type(value), value) not in allowed.get(name, ())
        }


def one_problem(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
    """The value that one type of a union accepts, or the problem of the type that was meant."""
    try:
        return validate(value)
    except ValidationError as error:  # it lists the problems of each type
        found = error.errors()[-1 if isinstance(value, list) else 0]
        raise PydanticKnownError(found["type"], found.get("ctx")) from None  # type: ignore[arg-type]


def strays(
    section: BaseModel, other: str, value: str, names: Iterable[str], fits: bool | None = None
) -> list[str]:
    """A line for each key that is set although it belongs to another value of another key.

    Args:
        section: the section.
        other: the other key.
        value: the value of it to which the keys belong.
        names: the keys.
        fits: whether the keys belong here. None: whether `other` has `value`.
    """
    given = getattr(section, other)
    if given == value if fits is None else fits:
        return []
    return [
        f"{name}={repr(own).lower()} belongs to {other} {value!r}, but {other} is {given!r}: leave "
        f"it out, or use {other} {value!r}"
        for name in names
        if (own := getattr(section, name)) != type(section).model_fields[name].default
    ]
