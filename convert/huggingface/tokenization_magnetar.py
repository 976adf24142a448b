"""A SentencePiece vocabulary for transformers, whose pieces are those of the training."""

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer


class MagnetarTokenizer(PreTrainedTokenizer):
    """The vocabulary in `tokenizer.model`; nothing is added to a text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """Read the vocabulary."""
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.processor.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        pieces = {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.processor.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some pieces."""
        return self.processor.decode(tokens)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the vocabulary."""
        name = "-".join(filter(None, [filename_prefix, "tokenizer.model"]))
        return (shutil.copy(self.vocab_file, Path(save_directory, name)).__str__(),)
