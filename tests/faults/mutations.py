"""Broken JSONs and broken files, as hypothesis strategies; tests.faults.fuzz uses them."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# Absolute paths stay away: a launcher may well write where it is told to.
TEXTS = (
    *("", " ", "auto", "true", "null", "none", "NaN", "1e5", "0", "-1", "cpu", "fp16", "..", "."),
    *("\u0000", "a\nb", "\u202e\u0661", "\U0001f9f2", "Ünïcödé", "x" * 5000, "\ud800"),
    *("tokens", "pairs", "../inputs/tokens", "../runs/other", "other", "sentinel.txt"),
)
NUMBERS = (
    *(0, 1, 2, 3, 5, 7, 8, 16, 100, -1, -7, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 10**18, 10**30, -(2**63), 0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 2.0, 1e-300),
    *(1e-5, 0.1, 1e5, 1e30, 1e308, -0.5, float("nan"), float("inf"), float("-inf")),
)
NEAR: tuple[Any, ...] = (
    *(lambda v: v + 1, lambda v: v - 1, lambda v: -v, lambda v: v * 2, lambda v: v / 2, float, str),
    *(lambda v: [v], lambda v: v * 10**6, lambda v: v * 10**9, lambda v: {"value": v}),
    lambda v: v + 0.25,
)
CHANGES = (
    *["replace", "allowed"] * 5,
    *["add"] * 2,
    *("remove", "rename", "twice", "move", "swap"),
)
DAMAGES = ("truncate", "flip", "zero", "insert", "double", "empty", "noise", "cut")
WRONG = (*("", ",", "{", "}", "]", '"', "//", "\\", "'", "\x00", "\ufeff", "[" * 2000, "1" * 5000),)
SMALL: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1], [0, 0], ["a"], {"a": 1}, [None])


class Members(list[tuple[str, Any]]):
    """The members of an object; a key may come twice."""


def as_members(value: Any) -> Any:
    """The value with Members for objects."""
    if isinstance(value, dict):
        return Members((key, as_members(inner)) for key, inner in value.items())
    return [as_members(inner) for inner in value] if isinstance(value, list) else value


def encoded(value: Any) -> str:
    """As JSON, or nearly: keys twice, NaN and raw text are written."""
    if isinstance(value, Members):
        return "{" + ", ".join(f"{json.dumps(k)}: {encoded(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(encoded, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> list[tuple[Members, int]]:
    """Every member of every object within, the outer ones first."""
    found = []
    if isinstance(value, Members):
        for index, (_, inner) in enumerate(value):
            found += [(value, index), *places(inner)]
    elif isinstance(value, list):
        for inner in value:
            found += places(inner)
    return found


def objects(value: Members) -> list[Members]:
    """The object and every one within."""
    inner = [members[index][1] for members, index in places(value)]
    return [value, *(each for each in inner if isinstance(each, Members))]


@st.composite
def other_values(draw: st.DrawFn, value: Any, words: Sequence[str]) -> Any:
    """In the place of a value: another number, another type, another word."""
    kinds = ["number", "word", "small", "text"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        kinds += ["near"] * 3
    kind = draw(st.sampled_from(kinds))
    if kind == "near":
        return draw(st.sampled_from(NEAR))(value)
    if kind == "number":
        return draw(st.sampled_from(NUMBERS))
    if kind == "word":
        return draw(st.sampled_from(words))
    if kind == "small":
        return as_members(draw(st.sampled_from(SMALL)))
    made = st.text(max_size=20).map(lambda text: text.lstrip("/").replace("..", ""))
    return draw(st.sampled_from(TEXTS) | made)


@st.composite
def mutated(
    draw: st.DrawFn, start: Members, keys: Mapping[str, Sequence[Any]], words: Sequence[str]
) -> Members:
    """An object with one to three things wrong, or with none that matters.

    keys: paths that may be set, with values that each takes if all else is right.
    """
    root = copy.deepcopy(start)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = places(root)
        if not found:
            break
        members, index = draw(st.sampled_from(found))
        key, value = members[index]
        what = draw(st.sampled_from(CHANGES))
        if what == "replace":
            members[index] = (key, draw(other_values(value, words)))
        elif what == "remove":
            del members[index]
        elif what == "rename":
            near = [key + "s", key[:-1], key.upper(), key.replace("_", "-"), key[::-1], "\u0435"]
            members[index] = (draw(st.sampled_from(["", *near, *keys])), value)
        elif what == "twice":
            members.insert(
                draw(st.integers(0, len(members))), (key, draw(other_values(value, words)))
            )
        elif what == "move":
            del members[index]
            draw(st.sampled_from(objects(root))).append((key, value))
        elif what == "swap":
            others, other = draw(st.sampled_from(found))
            theirs = others[other]
            others[other] = (theirs[0], copy.deepcopy(value))
            members[index] = (key, copy.deepcopy(theirs[1]))
        else:
            path, allowed = draw(st.sampled_from(list(keys.items())))
            is_allowed = what == "allowed" and allowed
            new = st.sampled_from(allowed) if is_allowed else other_values(1, words)
            _set(root, path.split("."), draw(new))
    return root


def _set(root: Members, path: Sequence[str], value: Any) -> None:
    """Add a member at a path, making the objects on the way."""
    for name in path[:-1]:
        inner = next((v for k, v in root if k == name and isinstance(v, Members)), None)
        if inner is None:
            inner = Members()
            root.append((name, inner))
        root = inner
    root[:] = [(k, v) for k, v in root if k != path[-1]] + [(path[-1], value)]


@st.composite
def broken_jsons(
    draw: st.DrawFn, start: dict[str, Any], keys: Mapping[str, Sequence[Any]], words: Sequence[str]
) -> bytes:
    """A mutated object as text, and now and then text that has been damaged after that."""
    root = draw(mutated(as_members(start), keys, words))
    text = encoded(root)
    content = text.encode("utf-8", "surrogatepass")
    how = draw(st.sampled_from(["whole"] * 7 + ["garbled", "bytes", "encoding"]))
    if how == "garbled":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(WRONG)) + text[at + draw(st.integers(0, 3)) :]
        return text.encode("utf-8", "surrogatepass")
    if how == "bytes":
        return draw(damaged(content))
    if how == "encoding":
        name = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32", "utf-16-be", "cp037"]))
        return text.encode(name, "replace")
    return content


@st.composite
def damaged(draw: st.DrawFn, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bytes that were truncated, flipped, overwritten, doubled, or are those of another file."""
    how = draw(st.sampled_from(DAMAGES + ("other",) * bool(others)))
    if how == "other":
        return draw(st.sampled_from(others))
    if how == "empty":
        return b""
    if how == "noise":
        return draw(st.binary(max_size=200))
    if how == "double":
        return content + content
    at = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.sampled_from([1, 1, 2, 4, 16, 1000]))
    if how == "truncate":
        return content[:at]
    if how == "cut":
        return content[:at] + content[at + length :]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
    if how == "zero":
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    flipped = bytearray(content)
    for _ in range(draw(st.integers(1, 4)) if content else 0):
        place = draw(st.integers(0, len(content) - 1))
        flipped[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)


class Drawn(NamedTuple):
    """One case: of what it is made, and what it is."""

    name: str
    value: Any


def drawn(cases: dict[str, st.SearchStrategy[Any]], number: int, of_seed: int) -> list[Drawn]:
    """So many values, of each strategy alike; the same ones for the same seed."""
    found: list[Drawn] = []
    for index, (name, strategy) in enumerate(cases.items()):
        wanted = number // len(cases) + (index < number % len(cases))
        own_seed = 1000 * of_seed + index  # else all would be broken in the same places
        found += [Drawn(name, value) for value in _values(strategy, wanted, own_seed)]
    return found


def _values(strategy: st.SearchStrategy[Any], number: int, of_seed: int) -> list[Any]:
    found: list[Any] = []

    @seed(of_seed)
    @settings(
        max_examples=max(1, number),
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[:number]
