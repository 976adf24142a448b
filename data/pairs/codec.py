"""A shared vocabulary that knows languages: text to ids for translation, and back.

The tag of a language is the symbol "<2xx>" of the vocabulary. A source begins with the tag of the
target language (Johnson et al., 2017), and both sides end with the end of document.

Encoding adds a space in front of a text and decoding removes it. So a word at the start of a
sentence has the same pieces as elsewhere.
"""

import re
from collections.abc import Sequence

from magnetar.data.errors import UserError
from magnetar.data.text.tokenizer import Tokenizer

LANGUAGE = re.compile(r"[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")


def tag(language: str) -> str:
    """The symbol of a language in the vocabulary."""
    return f"<2{language}>"


def check_language(language: str, languages: Sequence[str]) -> None:
    """Accept one of the languages.

    Raises:
        UserError: if it is none of them.
    """
    if language not in languages:
        raise UserError(f"language {language!r} is unknown here: use one of {', '.join(languages)}")


def parse_direction(direction: str, languages: Sequence[str]) -> tuple[str, str]:
    """Source and target language of "en-de"; either may hold hyphens itself.

    Raises:
        UserError: if it is not two of the languages, or can be read in two ways.
    """
    parts = direction.split("-")
    cuts = [("-".join(parts[:i]), "-".join(parts[i:])) for i in range(1, len(parts))]
    known = [cut for cut in cuts if cut[0] in languages and cut[1] in languages]
    if len(known) > 1:
        raise UserError(f"direction {direction!r} can be read in several ways: {known}")
    if not known or known[0][0] == known[0][1]:
        raise UserError(
            f"direction {direction!r} is not SOURCE-TARGET of two languages that are here: use two "
            f"of {', '.join(languages)}"
        )
    return known[0]


def tagged_languages(tokenizer: Tokenizer) -> list[str]:
    """The languages whose tags are pieces of a vocabulary, in the order of their ids."""
    spelt = re.compile(f"<2({LANGUAGE.pattern})>")
    pieces = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    found = [match[1] for piece in pieces if (match := spelt.fullmatch(piece))]
    return [language for language in found if len(tokenizer.encode(tag(language))) == 1]


class Codec:
    """Text to ids and back, with language tags.

    Attributes:
        tokenizer: the vocabulary; each language's tag is one piece of it.
        languages: the languages that have a tag.
        vocab_size: number of ids, which run from 0 to vocab_size - 1.
        eos_id: id that ends both sides, and with which a decoder starts.
    """

    def __init__(self, tokenizer: Tokenizer, languages: Sequence[str]) -> None:
        """A codec of a vocabulary.

        Raises:
            UserError: if the vocabulary has no tag for one of the languages.
        """
        self.tokenizer = tokenizer
        self.languages = tuple(languages)
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self._tag_ids: dict[str, int] = {}
        for language in self.languages:
            ids = tokenizer.encode(tag(language))
            if len(ids) != 1:
                raise UserError(
                    f"the vocabulary has no tag {tag(language)} for language {language!r}: use the "
                    "vocabulary that the pairs were prepared with, or prepare them again"
                )
            self._tag_ids[language] = ids[0]
        self._dropped = frozenset(self._tag_ids.values())
        tags = "|".join(re.escape(tag(language)[1:]) for language in self.languages)
        self._inside_tag = re.compile(f"(?<=<)(?={tags})")

    def tag_id(self, language: str) -> int:
        """Id of a language's tag.

        Raises:
            UserError: if the language is unknown.
        """
        check_language(language, self.languages)
        return self._tag_ids[language]

    def source_ids(self, text: str, target_language: str) -> list[int]:
        """The input of an encoder: the tag of the target language, the text, the end.

        Raises:
            UserError: if the language is unknown.
        """
        return [self.tag_id(target_language), *self.target_ids(text)]

    def target_ids(self, text: str) -> list[int]:
        """The target of a decoder: the text, the end."""
        return [*(i for part in self.parts(text) for i in self.tokenizer.encode(part)), self.eos_id]

    def parts(self, text: str) -> list[str]:
        """The parts of a text that the tokenizer encodes one by one.

        Text that merely spells a tag must not become one, so it is cut behind the "<".
        """
        return self._inside_tag.split(" " + text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids up to the first end; tags read as nothing."""
        kept: list[int] = []
        for i in ids:
            if i == self.eos_id:
                break
            if i not in self._dropped:
                kept.append(int(i))
        return self.tokenizer.decode(kept).removeprefix(" ")
