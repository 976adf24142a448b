import pytest

from magnetar.data.errors import UserError
from magnetar.data.text.lines import lines_of


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "is not UTF-8 at byte 1: save it as UTF-8"),
        ("utf-16-le", "has NUL bytes beside its letters, as UTF-16 has: save it as UTF-8"),
        ("latin1", "is not UTF-8 at byte 8: save it as UTF-8"),
    ],
)
def test_lines_in_another_encoding_are_named(encoding, message):
    text = "the caf\u00e9\n" if encoding == "latin1" else "the cup\n"
    content = text.encode(encoding)
    with pytest.raises(UserError, match=f"in.txt, line 1, {message}"):
        list(lines_of("in.txt", content.splitlines(keepends=True)))
